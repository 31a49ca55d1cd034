"""What trains: LoRA on the language model's linear layers, the projector in full, nothing else."""

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

PROJECTOR = "multi_modal_projector"


@dataclass(frozen=True)
class FreezeRow:
    """One line of the freeze plan.

    Attributes:
        module: Part of the model.
        dtype: Storage of its weights.
        trained: Whether it trains.
        parameters: How many it has; 4-bit ones are counted whole.
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
    base: str | None = None,
) -> LoraConfig:
    """The PEFT configuration of a run.

    Args:
        r: Rank.
        alpha: Scale.
        dropout: Dropout before A.
        rslora: Scale by the root of r.
        dora: Decompose into magnitude and direction.
        targets: Names of the language model's linear layers; empty for Stage 1, which has no adapters.
        base: What `base_model_name_or_path` is to say.

    Returns:
        A config whose target is a pattern rooted at the language model (CLIP has a `q_proj` too), with the projector
        in `modules_to_save`.
    """
    pattern = (
        rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(targets)})$"  # vLLM takes patterns that end so
    )
    return LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        target_modules=pattern if targets else DUMMY_TARGET_MODULES,  # peft's word for "modules_to_save alone"
        modules_to_save=[PROJECTOR],
        base_model_name_or_path=base,
        bias="none",
        task_type="CAUSAL_LM",
    )


def add_adapters(model: LlavaForConditionalGeneration, config: LoraConfig, projector_dropout: float = 0.0) -> PeftModel:
    """Freeze the model, add the adapters, and set the projector free, in fp32.

    A linear projector's second layer, the identity, stays frozen.

    Args:
        model: A `LlavaForConditionalGeneration`.
        config: From `lora_config`.
        projector_dropout: Dropout after the projector while training; a hook, so that checkpoints stay stock.

    Returns:
        The PEFT model.

    Raises:
        RuntimeError: Where the trained parameters are not those of the plan.
    """
    layers = model.config.text_config.num_hidden_layers
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
        per_layer = str(config.target_modules).rsplit("(", 1)[1].count("|") + 1
        check_adapters(peft_model, expected=layers * per_layer)
    return peft_model


def _reach_projector(projector: nn.Module, model: nn.Module, _: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Lead nothing through the projector where no image led there: a rank without a gradient for what others have one
    for leaves them waiting. One process does the same, so that its steps are those of many."""
    if model.training and torch.is_grad_enabled() and kwargs.get("pixel_values") is None:
        nothing = sum(0.0 * p.sum() for p in projector.parameters() if p.requires_grad)
        output.last_hidden_state = output.last_hidden_state + nothing
    return output


def adapter_on(model: LlavaForConditionalGeneration, config: LoraConfig) -> PeftModel:
    """Put a saved adapter's layers on a model without weights; who reads the weights fills them in.

    Args:
        model: With parameters on the meta device.
        config: As saved with the adapter.

    Returns:
        The PEFT model, its projector ready for float32 weights under a base of another dtype.
    """
    peft_model = PeftModel(model, config, low_cpu_mem_usage=True)
    if config.modules_to_save:
        trained_projector(peft_model).register_forward_pre_hook(_to_weight_dtype)
    return peft_model


def _to_weight_dtype(projector: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].to(projector.linear_1.weight.dtype),)  # type: ignore[union-attr, arg-type]


def trained_projector(model: PeftModel) -> nn.Module:
    """The projector that trains and is saved (PEFT keeps the base's beside it)."""
    wrapper = model.get_base_model().model.multi_modal_projector
    return wrapper.modules_to_save[model.active_adapter]


def check_adapters(model: PeftModel, expected: int) -> None:
    """Hold that every targeted layer has an adapter and that nothing of CLIP, embeddings or head trains.

    Raises:
        RuntimeError: Naming what is against the plan.
    """
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_modules() if name.endswith(".lora_A")}
    if len(adapted) != expected:
        raise RuntimeError(f"{len(adapted)} layers have an adapter; the plan says {expected}")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not ("lora_" in name or PROJECTOR in name):
            raise RuntimeError(f"{name} would train, against the plan")


def freeze_plan(model: nn.Module) -> list[FreezeRow]:
    """Say, part by part, what trains.

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
    """A parameter's elements; of a 4-bit one, those it stands for."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


def planned_parameters(config: LlavaConfig, lora: LoraConfig) -> dict[str, int]:
    """Count what a run would train, on the meta device: no weights are loaded.

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
