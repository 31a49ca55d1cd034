"""The trained parameters: LoRA on the language model's linear layers, and the complete projector."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from torch.nn import functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration

from lora_llava.model.families.decoder_shape import decoder_shape

PROJECTOR = "multi_modal_projector"


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
        base: Value of `base_model_name_or_path`.

    Returns:
        A config whose target is a pattern rooted at the language model (CLIP has a `q_proj` too), with the projector
        in `modules_to_save`.
    """
    # vLLM supports patterns with this ending.
    pattern = pattern or rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(targets)})$"
    return LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        target_modules=pattern if targets else DUMMY_TARGET_MODULES,  # peft's name for `modules_to_save` only
        modules_to_save=[PROJECTOR],
        base_model_name_or_path=base,
        bias="none",
        task_type="CAUSAL_LM",
    )


def add_adapters(model: LlavaForConditionalGeneration, config: LoraConfig, projector_dropout: float = 0.0) -> PeftModel:
    """Freeze the model, add the adapters, and unfreeze the projector in fp32.

    A linear projector's second layer, the identity, stays frozen.

    Args:
        model: A `LlavaForConditionalGeneration`.
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
    projector.register_forward_pre_hook(_to_weight_dtype)
    model.model.register_forward_hook(functools.partial(_reach_projector, projector), with_kwargs=True)
    if projector_dropout:
        projector.register_forward_hook(lambda module, _, output: F.dropout(output, projector_dropout, module.training))
    if config.target_modules != DUMMY_TARGET_MODULES:
        names = str(config.target_modules).rsplit("(", 1)[1].removesuffix(")$").split("|")
        linears = decoder_shape(model.config.text_config).linears
        check_adapters(peft_model, expected=sum(len(linears[name]) for name in names))
    return peft_model


def _reach_projector(projector: nn.Module, model: nn.Module, _: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Add a zero from the projector to the output of a batch without images.

    DDP waits for a gradient of every trained parameter on every rank. One process does the same, for equal results.
    """
    if model.training and torch.is_grad_enabled() and kwargs.get("pixel_values") is None:
        zero = sum(0.0 * p.sum() for p in projector.parameters() if p.requires_grad)
        output.last_hidden_state = output.last_hidden_state + zero
    return output


def adapter_on(model: LlavaForConditionalGeneration, config: LoraConfig) -> PeftModel:
    """Add a saved adapter's layers to a model without weights; the caller loads the weights.

    Args:
        model: A model with parameters on the meta device.
        config: The adapter's saved configuration.

    Returns:
        The PEFT model, whose projector may be float32 with a base of another dtype.
    """
    peft_model = PeftModel(model, config, low_cpu_mem_usage=True)
    if config.modules_to_save:
        trained_projector(peft_model).register_forward_pre_hook(_to_weight_dtype)
    return peft_model


def _to_weight_dtype(projector: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].to(projector.linear_1.weight.dtype),)  # type: ignore[union-attr, arg-type]


def trained_projector(model: PeftModel) -> nn.Module:
    """Return the trained projector, which is saved (PEFT keeps the base's projector beside it)."""
    wrapper = model.get_base_model().model.multi_modal_projector
    return wrapper.modules_to_save[model.active_adapter]


def check_adapters(model: PeftModel, expected: int) -> None:
    """Check that every targeted layer has an adapter, and that only adapters and projector train.

    Raises:
        RuntimeError: Naming the first difference from the plan.
    """
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_modules() if name.endswith(".lora_A")}
    if len(adapted) != expected:
        raise RuntimeError(f"{len(adapted)} layers have an adapter; the plan has {expected}")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not ("lora_" in name or PROJECTOR in name):
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
    parts = {
        "lora_": "LoRA adapters",
        "vision_tower": "vision tower",
        PROJECTOR: "projector",
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
        config: A `LlavaConfig`.
        lora: From `lora_config`.

    Returns:
        Trained parameters of `lora` and `projector`.
    """
    with torch.device("meta"):
        model = add_adapters(LlavaForConditionalGeneration(config), lora)
    counts = {"lora": 0, "projector": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["lora" if "lora_" in name else "projector"] += parameter.numel()
    return counts
