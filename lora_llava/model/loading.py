"""Load a base model: its device, dtype and quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import BitsAndBytesConfig, LlavaConfig, LlavaForConditionalGeneration

from lora_llava.core.errors import UserError
from lora_llava.model.vision import accept_features

Quantization = Literal["nf4", "none"]
NOT_QUANTIZED = ("model.multi_modal_projector", "model.vision_tower", "lm_head")
"""Full names: without `model.` transformers would quantize the first two."""


def default_device() -> torch.device:
    """Return the GPU of this process, or the CPU if there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def resolve_dtype(dtype: str) -> torch.dtype:
    """Return a dtype by name; `auto` is bfloat16 on a GPU and float32 on a CPU, where bfloat16 is slower."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]


def check_bitsandbytes() -> None:
    """Check that bitsandbytes works, with one small layer.

    Raises:
        UserError: If it does not.
    """
    try:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        layer = layer.to(default_device())
        layer(torch.zeros(1, 64, device=default_device()))
    except Exception as error:  # a missing or broken native library can raise anything
        raise UserError(
            f"NF4 is requested, but bitsandbytes cannot run here ({str(error).splitlines()[0]}); reinstall "
            "bitsandbytes for this machine, or set model.quantization=none"
        ) from None


def load_base(
    base: str | Path,
    *,
    quantization: Quantization = "none",
    dtype: str = "auto",
    revision: str | None = None,
    with_tower: bool = True,
    to_shard: bool = False,
) -> LlavaForConditionalGeneration:
    """Load a LLaVA for training or inference.

    Args:
        base: A base folder, a merged folder or a Hub id.
        quantization: `nf4` stores the language model's linear layers, and nothing else, in 4 bits, doubly quantized.
        dtype: Dtype of everything else, and of computation.
        revision: Branch, tag or commit of a Hub id.
        with_tower: Load the vision tower; without it the model accepts image features as its `pixel_values`.
        to_shard: Whether FSDP will shard the weights: 4-bit weights are then packed as floats, the only type that it
            shards, and all others stay on the CPU until then.

    Returns:
        The model on the default device, in eval mode.

    Raises:
        UserError: If bitsandbytes cannot run, or the base is not a LLaVA.
    """
    # 4-bit weights are packed on the GPU: their scales would not be moved with the shards.
    device = torch.device("cpu") if to_shard and quantization == "none" else default_device()
    options: dict[str, Any] = {"dtype": resolve_dtype(dtype), "device_map": {"": device}}
    if quantization == "nf4":
        check_bitsandbytes()
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=resolve_dtype(dtype),
            bnb_4bit_quant_storage=torch.bfloat16 if to_shard else torch.uint8,
            llm_int8_skip_modules=list(NOT_QUANTIZED),
        )
    try:
        if not with_tower:
            options["config"] = LlavaConfig.from_pretrained(base, revision=revision)
            options["config"].vision_config.num_hidden_layers = 0  # the rest is removed below
        model = LlavaForConditionalGeneration.from_pretrained(base, revision=revision, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{base} cannot be loaded as a LLaVA: {str(error).splitlines()[0]}") from None
    check_quantized(model, quantization)
    keep_autograd(model)
    if not with_tower:
        accept_features(model)
    return model.eval()


def keep_autograd(model: nn.Module) -> None:
    """Disable bitsandbytes' repacking of weights for AVX512-BF16 (bitsandbytes/nn/modules.py, Linear4bit.forward).

    It happens at the first evaluation on such a CPU. Every later forward pass then uses a bf16 operator without
    backward, and training after an evaluation would silently have wrong gradients.
    """
    for module in model.modules():
        if is_4bit(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_4bit(module: nn.Module) -> bool:
    """Check whether a module's weight is stored in 4 bits."""
    return type(getattr(module, "weight", None)).__name__ == "Params4bit"


def check_quantized(model: nn.Module, quantization: Quantization) -> None:
    """Check that exactly the language model's linear layers are 4-bit.

    Raises:
        RuntimeError: Naming the first module that is not as expected.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            expected = quantization == "nf4" and name.startswith("model.language_model.")
            if is_4bit(module) != expected:
                raise RuntimeError(f"{name} is {'not ' if expected else ''}4-bit, against the recipe")
