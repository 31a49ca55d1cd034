"""Loading a base: what device, what dtype, what is 4-bit; and an adapter on top of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import BitsAndBytesConfig, LlavaConfig, LlavaForConditionalGeneration

from lora_llava.core.errors import UserError
from lora_llava.model.vision import take_features

Quantization = Literal["nf4", "none"]
KEPT_WHOLE = ("model.multi_modal_projector", "model.vision_tower", "lm_head")
"""Anchored names: without `model.` transformers skips neither of the first two."""


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU; of several GPUs the one that this process was given."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def resolve_dtype(dtype: str) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU, where bfloat16 is slower."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]


def check_bitsandbytes() -> None:
    """Quantise and use one small layer.

    Raises:
        UserError: Where bitsandbytes cannot run here.
    """
    try:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        layer = layer.to(default_device())
        layer(torch.zeros(1, 64, device=default_device()))
    except Exception as error:  # a missing or broken native library raises anything
        raise UserError(
            f"NF4 is asked for, but bitsandbytes cannot run here ({str(error).splitlines()[0]}); reinstall "
            "bitsandbytes for this machine, or set model.quantization=none"
        ) from None


def load_base(
    base: str | Path,
    *,
    quantization: Quantization = "none",
    dtype: str = "auto",
    revision: str | None = None,
    with_tower: bool = True,
    to_share: bool = False,
) -> LlavaForConditionalGeneration:
    """Load a LLaVA for training or inference.

    Args:
        base: A base folder, a merged folder or a Hub id.
        quantization: `nf4` puts the language model's linear layers into 4 bits, doubly quantised, and nothing else.
        dtype: What everything else is in and what is computed in.
        revision: Branch, tag or commit of a Hub id.
        with_tower: Load the vision tower; without it the model takes features of images as its `pixel_values`.
        to_share: Whether FSDP is to share the weights out: those of 4 bits are then packed as floats, as it takes no
            others, and all others stay on the CPU until it does.

    Returns:
        The model on the default device, in eval mode.

    Raises:
        UserError: Where bitsandbytes cannot run, or the base is not a LLaVA.
    """
    # bitsandbytes packs where it computes; its scales do not follow when weights are shared out.
    device = torch.device("cpu") if to_share and quantization == "none" else default_device()
    options: dict[str, Any] = {"dtype": resolve_dtype(dtype), "device_map": {"": device}}
    if quantization == "nf4":
        check_bitsandbytes()
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=resolve_dtype(dtype),
            bnb_4bit_quant_storage=torch.bfloat16 if to_share else torch.uint8,
            llm_int8_skip_modules=list(KEPT_WHOLE),
        )
    try:
        if not with_tower:
            options["config"] = LlavaConfig.from_pretrained(base, revision=revision)
            options["config"].vision_config.num_hidden_layers = 0  # what is left is dropped below
        model = LlavaForConditionalGeneration.from_pretrained(base, revision=revision, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{base} cannot be loaded as a LLaVA: {str(error).splitlines()[0]}") from None
    check_quantized(model, quantization)
    keep_autograd(model)
    if not with_tower:
        take_features(model)
    return model.eval()


def keep_autograd(model: nn.Module) -> None:
    """Switch off bitsandbytes' repacking of weights for AVX512-BF16 (bitsandbytes/nn/modules.py, Linear4bit.forward).

    It happens at the first evaluation on such a CPU and sends every later forward through an operator without
    backward, in bf16: training after an evaluation would get silently wrong gradients.
    """
    for module in model.modules():
        if is_4bit(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_4bit(module: nn.Module) -> bool:
    """Whether a module's weight is stored in 4 bits."""
    return type(getattr(module, "weight", None)).__name__ == "Params4bit"


def check_quantized(model: nn.Module, quantization: Quantization) -> None:
    """Hold that exactly the language model's linear layers are 4-bit.

    Raises:
        RuntimeError: Naming a module that should be and is not, or the other way round.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            expected = quantization == "nf4" and name.startswith("model.language_model.")
            if is_4bit(module) != expected:
                raise RuntimeError(f"{name} is {'not ' if expected else ''}4-bit, against the recipe")
