"""What NF4 makes of a weight."""

from __future__ import annotations

import torch


def nf4_round_trip(weight: torch.Tensor) -> torch.Tensor:
    """Quantise a weight as `load_base` does (NF4, doubly quantised) and turn it back.

    Args:
        weight: Shape (out, in), any float dtype; of bf16 values, bitsandbytes makes the same codes in every dtype.

    Returns:
        The weight that a 4-bit layer computes with, float32; one that computes in bf16 rounds it.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # not every machine can load it

    packed, state = quantize_4bit(weight.float(), compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state)
