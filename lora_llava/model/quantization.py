"""What NF4 makes of a weight."""

from __future__ import annotations

import torch

from lora_llava.model.loading import default_device


def nf4_round_trip(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Quantise a weight as `load_base` does (NF4, doubly quantised) and turn it back.

    Args:
        weight: Shape (out, in), any float dtype.
        dtype: What the model is loaded in: transformers casts before bitsandbytes quantises.

    Returns:
        The weight that a 4-bit layer computes with, float32, on the CPU; a layer that computes in bf16 rounds it.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # not every machine can load it

    # On the device that trains: bitsandbytes has kernels of its own for each. Codes are the same from float32.
    cast = weight.to(default_device(), dtype).float()
    packed, state = quantize_4bit(cast, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state).cpu()
