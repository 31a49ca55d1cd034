"""Load a base model: its device, dtype and quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import BitsAndBytesConfig

from lora_llava.core.device import capability_problem, has_bfloat16, report_unused_gpu
from lora_llava.core.errors import UserError
from lora_llava.model.families.llava_kinds import llava_class, read_llava_config
from lora_llava.model.vision import accept_features
from lora_llava.model.weights.names import NEWLINE_NAME

Quantization = Literal["nf4", "none"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NOT_QUANTIZED = ("model.multi_modal_projector", "model.vision_tower", "lm_head")
"""Full names: without `model.` transformers would quantize the first two."""


def default_device() -> torch.device:
    """Return the GPU of this process, or the CPU if there is none; the first call reports a GPU that is not used."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    report_unused_gpu()
    return torch.device("cpu")


def resolve_dtype(dtype: str) -> torch.dtype:
    """Return a dtype by name.

    Args:
        dtype: `bfloat16`, `float16`, `float32`, or `auto`: float32 on a CPU, where the others are slower, bfloat16 on a
            GPU, and float16 on a GPU without it.
    """
    if dtype == "auto":
        on_gpu = "bfloat16" if torch.cuda.is_available() and has_bfloat16() else "float16"
        dtype = on_gpu if torch.cuda.is_available() else "float32"
    return DTYPES[dtype]


def check_dtype(dtype: str) -> None:
    """Check that this machine computes in a dtype itself.

    Args:
        dtype: As for `resolve_dtype`.

    Raises:
        UserError: For bfloat16 on a GPU that only emulates it.
    """
    if dtype == "bfloat16" and torch.cuda.is_available() and (problem := capability_problem()):
        raise UserError(
            f"model.dtype is bfloat16, which would be emulated, many times slower: {problem}; set model.dtype=float16, "
            "or auto"
        )


def check_machine(quantization: Quantization, dtype: str) -> None:
    """Check that this machine can compute as a recipe says, and report a GPU that is not used.

    Args:
        quantization: `nf4` or `none`.
        dtype: As for `resolve_dtype`.

    Raises:
        UserError: If bitsandbytes or the dtype cannot run here.
    """
    report_unused_gpu()
    check_dtype(dtype)
    if quantization == "nf4":
        check_bitsandbytes()


def describe_dtype(dtype: torch.dtype) -> str | None:
    """Return a line about float16, which needs loss scaling; None for any other dtype."""
    if dtype != torch.float16:
        return None
    problem = capability_problem() if torch.cuda.is_available() else None
    return "dtype: float16 with loss scaling" + (f", as {problem}, and has no bfloat16" if problem else "")


def autocast(device: torch.device | str, dtype: torch.dtype) -> torch.autocast:
    """Return the context of a forward pass in training: what trains is float32, and computes in the model's dtype.

    Args:
        device: The model's device.
        dtype: The model's dtype; float32 needs no autocast.
    """
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


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
) -> Any:
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
        The stock model on the default device, in eval mode.

    Raises:
        UserError: If bitsandbytes or the dtype cannot run here, or the base is not a LLaVA.
    """
    check_dtype(dtype)
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
        config = read_llava_config(base, revision)
        if not with_tower:
            config.vision_config.num_hidden_layers = 0  # the rest is removed below
        options |= {"config": config, "output_loading_info": True}
        model, found = llava_class(config).from_pretrained(base, revision=revision, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{base} cannot be loaded as a LLaVA: {str(error).splitlines()[0]}") from None
    if NEWLINE_NAME in found["missing_keys"]:
        raise UserError(f"{base} lacks image_newline, which a LLaVA-1.6 has; download or write its weights again")
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
