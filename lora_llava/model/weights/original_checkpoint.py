"""Read checkpoints and LoRA folders in LLaVA's original format (github.com/haotian-liu/LLaVA)."""

from __future__ import annotations

import ast
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.core.json_files import read_object
from lora_llava.model.adapter_file import refuse_settings
from lora_llava.model.adapters import NEWLINE
from lora_llava.model.base import assembled_config, language_tensors, lazy_projector, vision_tensors
from lora_llava.model.families.llava_kinds import LLAVA_KINDS
from lora_llava.model.families.tower_families import image_tokens
from lora_llava.model.tokenizer import Vocabulary
from lora_llava.model.weights.names import NEWLINE_NAME, canonical_name
from lora_llava.model.weights.original_projector import identity_layer, is_original_config, projector_names
from lora_llava.model.weights.streaming import build_empty
from lora_llava.model.weights.tensor_files import LazyTensor, lazy_file, lazy_tensors

LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin")
OTHER_FILE = "non_lora_trainables.bin"
_TOWER_PREFIX = "model.vision_tower.vision_tower."
_NOT_LLM = ("mm_", "use_mm_", "tune_mm_", "freeze_mm_", "unfreeze_mm_", "image_", "tokenizer_", "_name_or_path")
"""Prefixes of keys in LLaVA's config.json that are not the language model's (llava/train/train.py)."""
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_ASPECTS = {"pad": "pad", "square": "crop"}
_LANGUAGE_MODELS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
"""Stock model_type of the language model, by LLaVA's model_type."""
_TILES = ("anyres", "spatial_unpad")
"""LLaVA-1.6's image_aspect_ratio and mm_patch_merge_type, which stock `LlavaNextForConditionalGeneration` computes."""
_KNOWN = {
    "model_type": tuple(_LANGUAGE_MODELS),
    "mm_projector_type": ("linear", "mlp2x_gelu"),
    "mm_vision_select_feature": tuple(_STRATEGIES),
}
"""Settings, and their values that a stock model can have; the first is that of a config.json without it."""
_LORA_NAME = re.compile(
    r"base_model\.model\.model\.(layers\.\d+\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])(?:\.default)?\.weight"
)


@dataclass(frozen=True)
class OriginalConfig:
    """The settings in LLaVA's config.json.

    Attributes:
        llm: The language model's configuration.
        vision_tower: Name of the CLIP tower.
        projector_type: `mlp2x_gelu` or `linear`.
        feature_layer: Layer of the tower whose features are used.
        strategy: `default` drops CLIP's CLS, `full` keeps it.
        image_aspect: `pad` or `crop`; without effect if there is a grid.
        grid: Canvases of a LLaVA-1.6, each a height and a width in pixels; empty for a LLaVA-1.5.
        own_tower: Whether the tower was trained, so that a full checkpoint has its weights.
    """

    llm: dict[str, Any]
    vision_tower: str
    projector_type: str
    feature_layer: int
    strategy: str
    image_aspect: str
    grid: tuple[tuple[int, int], ...] = ()
    own_tower: bool = False


def is_original(folder: Path) -> bool:
    """Check whether a folder is a checkpoint or LoRA folder in LLaVA's original format."""
    return is_original_config(_read_config(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json; LLaVA writes one beside its weights")
    return read_object(file)


def read_config(folder: Path) -> OriginalConfig:
    """Read LLaVA's config.json.

    Raises:
        UserError: If it is not LLaVA's, or has a setting that stock transformers does not support.
    """
    content = _read_config(folder)
    if str(content.get("model_type")) in LLAVA_KINDS and "vision_config" in content:
        raise UserError(f"{folder} is already in the stock format; use it directly")
    if not is_original_config(content):
        raise UserError(
            f"{folder}/config.json has no mm_vision_tower; it is not a checkpoint in LLaVA's original format"
        )
    _refuse_config(content, folder)
    aspect, grid = _read_aspect(content, folder)
    language = {name: value for name, value in content.items() if not name.startswith(_NOT_LLM)}
    return OriginalConfig(
        language | {"model_type": _LANGUAGE_MODELS[content.get("model_type", "llava")]},
        content["mm_vision_tower"],
        content.get("mm_projector_type", "linear"),
        content.get("mm_vision_select_layer", -2),
        _STRATEGIES[content.get("mm_vision_select_feature", "patch")],
        aspect,
        grid,
        bool(content.get("unfreeze_mm_vision_tower")),
    )


def _refuse_config(content: Mapping[str, Any], folder: Path) -> None:
    """Refuse a setting that stock models do not have."""
    for name, known in _KNOWN.items():
        found = content.get(name, known[0])
        if found not in known:
            raise UserError(f"{folder}: {name} is {found}; only {', '.join(known[:-1])} and {known[-1]} are supported")
    if content.get("mm_resampler_type"):
        raise UserError(
            f"{folder}: mm_resampler_type is {content['mm_resampler_type']}; stock models have no resampler"
        )
    if content.get("mm_use_im_start_end"):
        raise UserError(
            f"{folder}: mm_use_im_start_end is true: its images stand between <im_start> and <im_end>, which stock "
            "processors do not write; use a checkpoint without"
        )


def _read_aspect(content: Mapping[str, Any], folder: Path) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return `image_aspect` and `grid` of an `OriginalConfig`."""
    aspect, merge = content.get("image_aspect_ratio") or "square", content.get("mm_patch_merge_type") or "flat"
    if (aspect, merge) == _TILES:
        if content.get("mm_vision_select_feature", "patch") != "patch":
            raise UserError(f"{folder}: mm_vision_select_feature is cls_patch; with tiles only patch is supported")
        return "pad", _read_grid(content.get("image_grid_pinpoints"), folder)
    if aspect not in (*_ASPECTS, _TILES[0]):
        raise UserError(f"{folder}: image_aspect_ratio is {aspect}; only pad, square and anyres are supported")
    if aspect == _TILES[0] or merge != "flat":
        raise UserError(
            f"{folder}: mm_patch_merge_type is {merge} and image_aspect_ratio {aspect}; stock models compute "
            f"{_TILES[1]} with {_TILES[0]}, and flat with pad and square"
        )
    return _ASPECTS[aspect], ()


def _read_grid(value: Any, folder: Path) -> tuple[tuple[int, int], ...]:
    """Return the canvases of LLaVA's `image_grid_pinpoints`, in their order.

    LLaVA's are width and height, stock models' height and width. The order decides between canvases that are equally
    good, as they are for all images smaller than a tile.
    """
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
        grid = tuple((height, width) for width, height in found)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        grid = ()
    if not grid or not all(type(side) is int and side > 0 for canvas in grid for side in canvas):
        raise UserError(
            f"{folder}: image_grid_pinpoints is {reprlib.repr(value)}; it should be a list of widths and heights in "
            "pixels, such as [[336, 672], [672, 336]]"
        )
    return grid


def stock_config(original: OriginalConfig, vision: Mapping[str, Any], vocabulary: Vocabulary) -> LlavaConfig:
    """Return the stock configuration of an original checkpoint, its tower's config.json and its tokenizer's ids."""
    config = assembled_config(original.llm, dict(vision), original.projector_type, vocabulary, original.grid)
    config.vision_feature_layer = original.feature_layer
    config.vision_feature_select_strategy = original.strategy
    config.image_seq_length = image_tokens(config)
    return config


def checkpoint_tensors(
    folder: Path, config: LlavaConfig, original: OriginalConfig, tower: Sequence[LazyTensor]
) -> list[LazyTensor]:
    """Return a full checkpoint's tensors under llava-hf's names.

    Args:
        folder: The checkpoint.
        config: From `stock_config`.
        original: From `read_config`.
        tower: The CLIP tower's tensors, used unless the checkpoint has its own.

    Raises:
        UserError: For an unknown name, a shape that differs from the config, or a missing tensor.
    """
    language, own_tower, projector, newline = [], [], [], []
    for tensor in lazy_tensors(folder):
        if tensor.name.startswith(_TOWER_PREFIX):
            own_tower.append(replace(tensor, name=tensor.name.removeprefix(_TOWER_PREFIX)))
        elif "mm_projector." in tensor.name:
            projector.append(tensor)
        elif tensor.name == NEWLINE_NAME:
            newline.append(replace(tensor, name=NEWLINE))
        else:
            language.append(tensor)
    if original.own_tower and not own_tower:
        raise UserError(f"{folder}: unfreeze_mm_vision_tower is true, but its weights have no vision tower")
    found = [
        *language_tensors(language, config),
        *vision_tensors(own_tower or tower),
        *projector_tensors(projector, original.projector_type, folder),
        *newline,
    ]
    check_tensors(found, config, folder)
    return found


def projector_tensors(tensors: Sequence[LazyTensor], projector_type: str, source: Path) -> list[LazyTensor]:
    """Return LLaVA's `mm_projector` tensors under llava-hf's names; a linear one gets an identity layer.

    Raises:
        UserError: For an unknown name.
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
    """Check that tensors are exactly those of a stock model.

    Raises:
        UserError: Naming the first that is unknown, missing or of another shape.
    """
    expected = {name: tuple(p.shape) for name, p in build_empty(config).named_parameters()}
    found = {canonical_name(tensor.name): tensor for tensor in tensors}
    for name, tensor in found.items():
        if name not in expected:
            raise UserError(f"{source}: {tensor.name} is not a tensor of a LLaVA; it is another model's checkpoint")
        if tensor.shape != expected[name]:
            raise UserError(
                f"{source}: {tensor.name} has shape {tensor.shape}, and its config.json requires {expected[name]}"
            )
    missing = sorted(set(expected) - set(found))
    if missing:
        raise UserError(f"{source}: {missing[0]} is missing ({len(missing)} tensors in all)")


@dataclass(frozen=True)
class OriginalLora:
    """The contents of a LoRA folder, under our names.

    Attributes:
        tensors: Under the names that PEFT saves for our runs, including the projector, and the newline if it has one.
        targets: The linear layers that have an adapter.
        settings: `r`, `alpha`, `dropout`, `rslora`, `dora`.
        llm: The language model it was trained on.
        has_newline: Whether it has the newline of a LLaVA-1.6.
    """

    tensors: list[LazyTensor]
    targets: tuple[str, ...]
    settings: dict[str, Any]
    llm: str
    has_newline: bool


def read_lora(folder: Path, original: OriginalConfig, layers: int) -> OriginalLora:
    """Read LLaVA's LoRA folder: `adapter_model` and `non_lora_trainables.bin`.

    Args:
        folder: The folder.
        original: From `read_config`.
        layers: Decoder layers of the language model.

    Raises:
        UserError: For an unknown name, or adapters that are not the same on all layers.
    """
    settings = read_object(folder / "adapter_config.json")
    refuse_settings(settings, folder / "adapter_config.json")
    for name in ("r", "lora_alpha"):
        if name not in settings:
            raise UserError(f"{folder}/adapter_config.json has no {name}; it is not PEFT's")
    file = next((folder / name for name in LORA_FILES if (folder / name).is_file()), folder / LORA_FILES[0])
    tensors, found = [], set()
    for tensor in lazy_file(file):
        match = _LORA_NAME.fullmatch(tensor.name)
        if match is None:
            raise UserError(
                f"{file}: {tensor.name} is not an adapter of a language model's layer; it cannot be imported"
            )
        layer, target, half = match.groups()
        name = f"base_model.model.model.language_model.{layer}.lora_{half}.weight"
        tensors.append(replace(tensor, name=name))
        found.add((layer.split(".")[1], target, half))
    targets = tuple(sorted({target for _, target, _ in found}))
    if len(found) != layers * len(targets) * 2:
        raise UserError(
            f"{file}: {len(found)} LoRA matrices; {', '.join(targets)} on {layers} layers would be "
            f"{layers * len(targets) * 2}: the layers have different adapters"
        )
    others, newline = _trained_in_full(folder / OTHER_FILE, tiled=bool(original.grid))
    projector = projector_tensors(others, original.projector_type, folder / OTHER_FILE)
    if not projector:
        raise UserError(f"{folder}/{OTHER_FILE} has no projector; it is not a complete LLaVA adapter")
    tensors += [replace(tensor, name=f"base_model.model.model.{tensor.name}") for tensor in [*projector, *newline]]
    chosen = {
        "r": settings["r"],
        "alpha": settings["lora_alpha"],
        "dropout": settings.get("lora_dropout", 0.0),
        "rslora": settings.get("use_rslora", False),
        "dora": settings.get("use_dora", False),
    }
    return OriginalLora(tensors, targets, chosen, settings.get("base_model_name_or_path", ""), bool(newline))


def _trained_in_full(file: Path, *, tiled: bool) -> tuple[list[LazyTensor], list[LazyTensor]]:
    """Return the tensors of the projector, and the newline under its short name; no other can be imported."""
    projector, newline = [], []
    for tensor in lazy_file(file):
        if "mm_projector." in tensor.name:
            projector.append(tensor)
        elif tiled and tensor.name.rpartition(".")[2] == NEWLINE:
            newline.append(replace(tensor, name=NEWLINE))
        else:
            raise UserError(f"{file}: {tensor.name} was trained besides LoRA and projector; it cannot be imported")
    return projector, newline
