"""LLaVA's own checkpoints and LoRA folders (github.com/haotian-liu/LLaVA), under transformers' names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.model.adapter_file import refuse_settings
from lora_llava.model.base import assembled_config, language_tensors, lazy_projector, vision_tensors
from lora_llava.model.weights.names import canonical_name
from lora_llava.model.weights.original_projector import identity_layer, is_original_config, projector_names
from lora_llava.model.weights.streaming import build_empty
from lora_llava.model.weights.tensor_files import LazyTensor, lazy_file, lazy_tensors

LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin")
OTHER_FILE = "non_lora_trainables.bin"
_TOWER_PREFIX = "model.vision_tower.vision_tower."
_NOT_LLAMA = ("mm_", "use_mm_", "tune_mm_", "freeze_mm_", "unfreeze_mm_", "image_", "tokenizer_", "_name_or_path")
"""Keys of LLaVA's config.json that are none of Llama's (llava/train/train.py)."""
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_ASPECTS = {"pad": "pad", "square": "crop"}
_LORA_NAME = re.compile(
    r"base_model\.model\.model\.(layers\.\d+\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])(?:\.default)?\.weight"
)


@dataclass(frozen=True)
class OriginalConfig:
    """What LLaVA's config.json says.

    Attributes:
        llm: Llama's configuration.
        vision_tower: Name of the CLIP tower.
        projector_type: `mlp2x_gelu` or `linear`.
        feature_layer: Layer of the tower whose features are taken.
        strategy: `default` drops CLIP's CLS, `full` keeps it.
        image_aspect: `pad` or `crop`.
    """

    llm: dict[str, Any]
    vision_tower: str
    projector_type: str
    feature_layer: int
    strategy: str
    image_aspect: str


def is_original(folder: Path) -> bool:
    """Whether a folder is LLaVA's own checkpoint or LoRA folder."""
    return is_original_config(_read_config(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no config.json; LLaVA writes one beside its weights")
    return _read_object(file)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {str(error).splitlines()[0]}; fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: it should hold an object; it holds {type(content).__name__}; fetch it again")
    return content


def read_config(folder: Path) -> OriginalConfig:
    """Read LLaVA's config.json.

    Raises:
        UserError: Where it is not LLaVA's, or asks for something that stock transformers does not do.
    """
    content = _read_config(folder)
    if content.get("model_type") == "llava" and "vision_config" in content:
        raise UserError(f"{folder} is a stock LLaVA already; use it as it is")
    if not is_original_config(content):
        raise UserError(f"{folder}/config.json has no mm_vision_tower; it is not one of LLaVA's own checkpoints")
    projector_type = content.get("mm_projector_type", "linear")
    if projector_type not in ("linear", "mlp2x_gelu"):
        raise UserError(f"{folder}: mm_projector_type is {projector_type}; only linear and mlp2x_gelu are supported")
    if content.get("mm_use_im_start_end"):
        raise UserError(
            f"{folder}: mm_use_im_start_end is true: its images stand between <im_start> and <im_end>, which stock "
            "processors do not write; take a checkpoint without"
        )
    feature = content.get("mm_vision_select_feature", "patch")
    if feature not in _STRATEGIES:
        raise UserError(f"{folder}: mm_vision_select_feature is {feature}; only patch and cls_patch are supported")
    aspect = content.get("image_aspect_ratio") or "square"
    if aspect not in _ASPECTS:
        raise UserError(f"{folder}: image_aspect_ratio is {aspect}; only pad and square are supported")
    return OriginalConfig(
        {name: value for name, value in content.items() if not name.startswith(_NOT_LLAMA)} | {"model_type": "llama"},
        content["mm_vision_tower"],
        projector_type,
        content.get("mm_vision_select_layer", -2),
        _STRATEGIES[feature],
        _ASPECTS[aspect],
    )


def stock_config(original: OriginalConfig, vision: Mapping[str, Any]) -> LlavaConfig:
    """The stock configuration of an original checkpoint and its tower's config.json."""
    config = assembled_config(original.llm, dict(vision), original.projector_type)
    config.vision_feature_layer = original.feature_layer
    config.vision_feature_select_strategy = original.strategy
    return config


def checkpoint_tensors(
    folder: Path, config: LlavaConfig, original: OriginalConfig, tower: Sequence[LazyTensor]
) -> list[LazyTensor]:
    """A full checkpoint's tensors under llava-hf's names.

    Args:
        folder: The checkpoint.
        config: From `stock_config`.
        original: From `read_config`.
        tower: The CLIP tower's tensors; those that the checkpoint carries itself take their place.

    Raises:
        UserError: For a name that is not LLaVA's, a shape that is not the config's, or a tensor that is missing.
    """
    language, own_tower, projector = [], [], []
    for tensor in lazy_tensors(folder):
        if tensor.name.startswith(_TOWER_PREFIX):
            own_tower.append(replace(tensor, name=tensor.name.removeprefix(_TOWER_PREFIX)))
        elif "mm_projector." in tensor.name:
            projector.append(tensor)
        else:
            language.append(tensor)
    found = [
        *language_tensors(language, config),
        *vision_tensors(own_tower or tower),
        *projector_tensors(projector, original.projector_type, folder),
    ]
    check_tensors(found, config, folder)
    return found


def projector_tensors(tensors: Sequence[LazyTensor], projector_type: str, source: Path) -> list[LazyTensor]:
    """LLaVA's `mm_projector` tensors under llava-hf's names, with the identity beside a linear one.

    Raises:
        UserError: For a name that is not that projector's.
    """
    names = projector_names(projector_type)
    found = []
    for tensor in tensors:
        short = tensor.name.split("mm_projector.")[-1]
        if short not in names:
            raise UserError(f"{source}: {tensor.name} is not a tensor of a {projector_type} projector")
        found.append(replace(tensor, name=f"multi_modal_projector.{names[short]}"))
    if projector_type == "linear" and found:
        found += lazy_projector(identity_layer(found[0].shape[0]))
    return found


def check_tensors(tensors: Sequence[LazyTensor], config: LlavaConfig, source: Path) -> None:
    """Hold that tensors are exactly those of a stock model.

    Raises:
        UserError: Naming the first that is unknown, missing or of another shape.
    """
    expected = {name: tuple(p.shape) for name, p in build_empty(config).named_parameters()}
    found = {canonical_name(tensor.name): tensor for tensor in tensors}
    for name, tensor in found.items():
        if name not in expected:
            raise UserError(f"{source}: {tensor.name} is no tensor of a LLaVA; it is another model's checkpoint")
        if tensor.shape != expected[name]:
            raise UserError(
                f"{source}: {tensor.name} has shape {tensor.shape}, its config.json asks for {expected[name]}"
            )
    missing = sorted(set(expected) - set(found))
    if missing:
        raise UserError(f"{source}: {missing[0]} is missing ({len(missing)} tensors in all)")


@dataclass(frozen=True)
class OriginalLora:
    """A LoRA folder's content under our names.

    Attributes:
        tensors: By the names that PEFT saves for our runs, the projector included.
        targets: The linear layers that have an adapter.
        settings: `r`, `alpha`, `dropout`, `rslora`, `dora`.
        llm: The language model it was trained on.
    """

    tensors: list[LazyTensor]
    targets: tuple[str, ...]
    settings: dict[str, Any]
    llm: str


def read_lora(folder: Path, original: OriginalConfig, layers: int) -> OriginalLora:
    """Read LLaVA's LoRA folder: `adapter_model` and `non_lora_trainables.bin`.

    Args:
        folder: The folder.
        original: From `read_config`.
        layers: Decoder layers of the language model.

    Raises:
        UserError: For a name that is not LLaVA's, or adapters that are not on all layers alike.
    """
    settings = _read_object(folder / "adapter_config.json")
    refuse_settings(settings, folder / "adapter_config.json")
    for name in ("r", "lora_alpha"):
        if name not in settings:
            raise UserError(f"{folder}/adapter_config.json lacks {name}; it is not PEFT's")
    file = next((folder / name for name in LORA_FILES if (folder / name).is_file()), folder / LORA_FILES[0])
    tensors, found = [], set()
    for tensor in lazy_file(file):
        match = _LORA_NAME.fullmatch(tensor.name)
        if match is None:
            raise UserError(f"{file}: {tensor.name} is no adapter of a language model's layer; it cannot be taken over")
        layer, target, half = match.groups()
        name = f"base_model.model.model.language_model.{layer}.lora_{half}.weight"
        tensors.append(replace(tensor, name=name))
        found.add((layer.split(".")[1], target, half))
    targets = tuple(sorted({target for _, target, _ in found}))
    if len(found) != layers * len(targets) * 2:
        raise UserError(
            f"{file}: {len(found)} LoRA matrices; {', '.join(targets)} on {layers} layers would be "
            f"{layers * len(targets) * 2}: not all layers are adapted alike"
        )
    projector = projector_tensors(_only_projector(folder / OTHER_FILE), original.projector_type, folder / OTHER_FILE)
    if not projector:
        raise UserError(f"{folder}/{OTHER_FILE} holds no projector; it is not a whole LLaVA adapter")
    tensors += [replace(tensor, name=f"base_model.model.model.{tensor.name}") for tensor in projector]
    chosen = {
        "r": settings["r"],
        "alpha": settings["lora_alpha"],
        "dropout": settings.get("lora_dropout", 0.0),
        "rslora": settings.get("use_rslora", False),
        "dora": settings.get("use_dora", False),
    }
    return OriginalLora(tensors, targets, chosen, settings.get("base_model_name_or_path", ""))


def _only_projector(file: Path) -> list[LazyTensor]:
    tensors = lazy_file(file)
    for tensor in tensors:
        if "mm_projector." not in tensor.name:
            raise UserError(f"{file}: {tensor.name} was trained besides LoRA and projector; it cannot be taken over")
    return tensors
