"""The trained parameters: LoRA on linear layers, and in full the projector and what else a recipe names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import LlavaConfig

from lora_llava.model.families.decoder_shape import decoder_shape
from lora_llava.model.families.llava_kinds import llava_class
from lora_llava.model.vision_adapters import VisionAdapters, planned_layers
from lora_llava.model.weights.names import ADAPTER_FILE, NEWLINE_NAME

PROJECTOR, VISION, NEWLINE = "multi_modal_projector", "vision_tower", "image_newline"
_NEWLINE_KEY = f"base_model.model.{NEWLINE_NAME}"
"""The newline in an adapter file. It is a parameter and no module: PEFT loads it, but does not train or save it."""
VOCABULARY = ("embed_tokens", "lm_head")
"""The two matrices with a row per token."""


@dataclass(frozen=True)
class FreezeRow:
    """One line of the freeze plan.

    Attributes:
        module: Part of the model.
        dtype: Storage dtype of its weights.
        trained: Whether it trains.
        parameters: Number of parameters; 4-bit ones are counted before packing.
    """

    module: str
    dtype: str
    trained: bool
    parameters: int


def lora_config(
    *,
    r: int = 64,
    alpha: float = 16,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    targets: Sequence[str] = (),
    pattern: str | None = None,
    vision: VisionAdapters | None = None,
    modules_to_save: Sequence[str] = (),
    token_ids: Sequence[int] = (),
    base: str | None = None,
) -> LoraConfig:
    """Return the PEFT configuration of a run.

    Args:
        r: Rank.
        alpha: Scale.
        dropout: Dropout before A.
        rslora: Scale by the root of r.
        dora: Decompose into magnitude and direction.
        targets: Names of the language model's linear layers; empty for Stage 1, which has no adapters.
        pattern: Pattern of these layers from `DecoderShape.pattern`; None is that of a Llama.
        vision: Adapters on the vision tower, or None.
        modules_to_save: What is saved besides the projector: matrices that are trained in full, and the newline of a
            LLaVA-1.6, which trains where there are no targets.
        token_ids: Ids of tokens whose rows of embeddings and head are trained.
        base: Value of `base_model_name_or_path`.

    Returns:
        A config whose target is a pattern rooted at the language model (CLIP has a `q_proj` too), with the projector
        in `modules_to_save`.
    """
    # vLLM supports patterns with this ending.
    pattern = pattern or rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(targets)})$"
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        target_modules=pattern if targets else DUMMY_TARGET_MODULES,  # peft's name for `modules_to_save` only
        modules_to_save=[PROJECTOR, *modules_to_save],
        trainable_token_indices={name: list(token_ids) for name in VOCABULARY} if token_ids else None,
        base_model_name_or_path=base,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return vision.add_to(config) if vision else config


def add_adapters(model: Any, config: LoraConfig, projector_dropout: float = 0.0) -> PeftModel:
    """Freeze the model, add the adapters, and unfreeze the projector in fp32.

    A linear projector's second layer, the identity, stays frozen.

    Args:
        model: A stock LLaVA.
        config: From `lora_config`.
        projector_dropout: Dropout after the projector while training; a hook, so that checkpoints stay stock.

    Returns:
        The PEFT model.

    Raises:
        RuntimeError: If the trained parameters are not those of the plan.
    """
    linear_projector = model.config.projector_hidden_act == "linear"
    model.requires_grad_(False)
    peft_model = get_peft_model(model, config)
    projector = trained_projector(peft_model).float()
    projector.linear_2.requires_grad_(not linear_projector)
    _keep_float32(peft_model, model.dtype)
    if (newline := saved_newline(peft_model)) is not None:
        newline.requires_grad_(config.target_modules == DUMMY_TARGET_MODULES)
    model.model.register_forward_hook(_reach, with_kwargs=True)
    if projector_dropout:
        projector.register_forward_hook(lambda module, _, output: F.dropout(output, projector_dropout, module.training))
    if config.target_modules != DUMMY_TARGET_MODULES:
        pattern = str(config.target_modules)
        names = pattern.rsplit("(", 1)[1].removesuffix(")$").split("|")
        linears = decoder_shape(model.config.text_config).linears
        planned = sum(len(linears[name]) for name in names) + planned_layers(pattern)
        check_adapters(peft_model, expected=planned - len(config.exclude_modules or ()))
    return peft_model


def _reach(model: Any, _: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Add a zero from projector, newline and vision adapters to the output of a batch without images.

    DDP waits for a gradient of every trained parameter on every rank. One process does the same, for equal results.
    """
    if model.training and torch.is_grad_enabled() and kwargs.get("pixel_values") is None:
        # Looked up in every pass: FSDP replaces the parameters.
        parts = (getattr(model, name, None) for name in (PROJECTOR, VISION))
        behind_images = [p for part in parts if part is not None for p in part.parameters()]
        behind_images += [p for name, p in model.named_parameters(recurse=False) if name == NEWLINE]
        zero = sum(0.0 * p.sum() for p in behind_images if p.requires_grad)
        output.last_hidden_state = output.last_hidden_state + zero
    return output


def adapter_on(model: Any, config: LoraConfig, dtype: torch.dtype = torch.float32) -> PeftModel:
    """Add a saved adapter's layers to a model without weights; the caller loads the weights.

    Args:
        model: A model with parameters on the meta device.
        config: The adapter's saved configuration.
        dtype: Dtype of the base.

    Returns:
        The PEFT model; what was trained in full is float32 in it.
    """
    peft_model = PeftModel(model, config, low_cpu_mem_usage=True)
    _keep_float32(peft_model, dtype)
    return peft_model


def _keep_float32(peft_model: PeftModel, dtype: torch.dtype) -> None:
    """Make what is trained in full float32, and let it take and return what a model of another dtype expects.

    AdamW's steps at a learning rate of 2e-5 are lost to rounding in bfloat16.
    """
    for module in saved_modules(peft_model).values():
        module.float()
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _, inputs, output: output.to(dtype))
        else:
            module.register_forward_pre_hook(_to_weight_dtype)
    for name, parameter in peft_model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data = parameter.data.float()
    if (newline := saved_newline(peft_model)) is not None:
        newline.data = newline.data.float()


def _to_weight_dtype(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].to(next(module.parameters()).dtype), *inputs[1:])


def saved_modules(peft_model: PeftModel) -> dict[str, nn.Module]:
    """Return the modules of `modules_to_save`, which are trained in full, by name in the stock model."""
    return {
        name: module.modules_to_save[peft_model.active_adapter]
        for name, module in peft_model.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def trained_projector(model: PeftModel) -> nn.Module:
    """Return the trained projector, which is saved (PEFT keeps the base's projector beside it)."""
    wrapper = model.get_base_model().model.multi_modal_projector
    return wrapper.modules_to_save[model.active_adapter]


def saved_newline(model: PeftModel) -> nn.Parameter | None:
    """Return the newline of a LLaVA-1.6 if it is part of the adapter; None if it is the base's."""
    saved = model.peft_config[model.active_adapter].modules_to_save or ()
    return getattr(model.get_base_model().model, NEWLINE) if NEWLINE in saved else None


def load_projector(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a model the projector of a run, and its newline if both have one.

    Args:
        model: The PEFT model.
        tensors: Tensors by `linear_1.weight` and so on, and `image_newline`, which a LLaVA-1.5's run does not have.
    """
    trained_projector(model).load_state_dict({name: each for name, each in tensors.items() if name != NEWLINE})
    if (newline := saved_newline(model)) is not None and NEWLINE in tensors:
        newline.data.copy_(tensors[NEWLINE])


def adapter_tensors(model: PeftModel, weights: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's adapter file by name: those that PEFT saves, and a newline of the adapter.

    Args:
        model: The PEFT model.
        weights: Its weights by name; None reads them from the model.
    """
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    newline = saved_newline(model)
    if newline is not None:
        tensors[_NEWLINE_KEY] = newline.detach() if weights is None else weights[_NEWLINE_KEY]
    return tensors


def save_adapter(model: PeftModel, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write an adapter's config and tensors, as PEFT does, and a newline of the adapter beside them.

    Args:
        model: The PEFT model.
        folder: The folder to write to.
        weights: The weights to save by name; None saves those of the model.
    """
    model.save_pretrained(str(folder), state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    newline = saved_newline(model)
    if newline is None:
        return
    value = newline.detach() if weights is None else weights[_NEWLINE_KEY]
    file, complete = folder / ADAPTER_FILE, folder / f"{ADAPTER_FILE}.new"
    save_file(load_file(file) | {_NEWLINE_KEY: value.cpu().contiguous()}, complete, {"format": "pt"})
    complete.replace(file)


_TRAINED = ("lora_", ".modules_to_save.", "trainable_tokens_delta")
"""Parts of the names that PEFT gives to trained parameters."""


def check_adapters(model: PeftModel, expected: int) -> None:
    """Check that every targeted layer has an adapter, and that only adapters and what is trained in full train.

    Raises:
        RuntimeError: Naming the first difference from the plan.
    """
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_modules() if name.endswith(".lora_A")}
    if len(adapted) != expected:
        raise RuntimeError(f"{len(adapted)} layers have an adapter; the plan has {expected}")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(part in name for part in _TRAINED):
            raise RuntimeError(f"{name} would train, against the plan")


def freeze_plan(model: nn.Module) -> list[FreezeRow]:
    """List which parts of a model train.

    Args:
        model: The PEFT model.

    Returns:
        Rows for vision tower, projector, embeddings, the language model's layers, adapters and head.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # the base's projector, which PEFT keeps beside the trained one
            continue
        groups.setdefault((_part_of(name), parameter.requires_grad), []).append(parameter)
    return [
        FreezeRow(part, _dtypes(parameters), trained, sum(map(true_numel, parameters)))
        for (part, trained), parameters in groups.items()
    ]


def _part_of(name: str) -> str:
    if "lora_" in name:
        return "LoRA adapters, vision tower" if VISION in name else "LoRA adapters"
    parts = {
        "trainable_tokens_delta": "new tokens",
        VISION: "vision tower",
        PROJECTOR: "projector",
        NEWLINE: "image newline",
        "embed_tokens": "embeddings",
        "lm_head": "head",
    }
    return next((part for key, part in parts.items() if key in name), "language model")


def _dtypes(parameters: Sequence[nn.Parameter]) -> str:
    names = ["nf4" if type(p).__name__ == "Params4bit" else str(p.dtype).removeprefix("torch.") for p in parameters]
    return " + ".join(dict.fromkeys(names))


def true_numel(parameter: nn.Parameter) -> int:
    """Return the number of elements of a parameter; of a 4-bit one, before packing."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


def planned_parameters(config: LlavaConfig, lora: LoraConfig) -> dict[str, int]:
    """Count the trained parameters of a run on the meta device, without loading weights.

    Args:
        config: A `LlavaConfig` or `LlavaNextConfig`.
        lora: From `lora_config`.

    Returns:
        Trained parameters of `lora` and `projector`, and of other parts if they train.
    """
    with torch.device("meta"):
        model = add_adapters(llava_class(config)(config), lora)
    counts = {"lora": 0, "projector": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = _COUNTED[_part_of(name)]
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


_COUNTED = {
    "LoRA adapters": "lora",
    "LoRA adapters, vision tower": "vision_lora",
    "projector": "projector",
    "image newline": NEWLINE,
    "new tokens": "new_tokens",
    "embeddings": "embed_tokens",
    "head": "lm_head",
}
"""Keys of `planned_parameters` by part of the model."""
