"""The NF4 quantization of a weight."""

from __future__ import annotations

import torch

from lora_llava.model.loading import default_device


def nf4_round_trip(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Quantize a weight as `load_base` does (NF4, doubly quantized) and dequantize it.

    Args:
        weight: Shape (out, in), any float dtype.
        dtype: Dtype in which the model is loaded: transformers casts before bitsandbytes quantizes.

    Returns:
        The weight that a 4-bit layer computes with, float32, on the CPU; a layer that computes in bf16 rounds it.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # cannot be imported on every machine

    # On the training device, as bitsandbytes has a kernel for each kind. From float32, the codes are the same.
    cast = weight.to(default_device(), dtype).float()
    packed, state = quantize_4bit(cast, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state).cpu()
