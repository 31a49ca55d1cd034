"""A check at every start: the first batch has the same loss padded and packed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lora_llava.core.errors import ReportedError
from lora_llava.model.fast_path.trained_loss import count_labels, labelled_loss
from lora_llava.model.vision import dtype_of
from lora_llava.training.callbacks import FLOAT16_LIMIT

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Relative differences that rounding can cause in each dtype, with some room."""
_PADDED_SAMPLES = 2
"""Samples of a padded batch: few, so that the reference needs less memory than the packed row."""


class StartCheckError(ReportedError):
    """The losses of packed and padded rows differ."""


@torch.no_grad()
def check_first_batch(
    model: Any, samples: Sequence[dict[str, Any]], padded: Callable[..., Any], packed: Callable[..., Any]
) -> str:
    """Compare the losses of the first batch, padded and packed.

    Args:
        model: The model to train; unchanged.
        samples: The samples of the first batch.
        padded: The reference collator.
        packed: The collator of training.

    Returns:
        A line to print, such as `packed 1.8234, padded 1.8234: equal`.

    Raises:
        StartCheckError: If they differ by more than rounding.
    """
    training = model.training
    model.eval()
    pairs = [samples[start : start + _PADDED_SAMPLES] for start in range(0, len(samples), _PADDED_SAMPLES)]
    batch = packed(samples)
    losses = [_loss(model, [batch]), _loss(model, [padded(pair) for pair in pairs])]
    model.train(training)
    found = f"{'shared' if 'key_segments' in batch else 'packed'} {losses[0]:.4f}, padded {losses[1]:.4f}"
    dtype = dtype_of(model)
    tolerance = TOLERANCES[dtype]
    if dtype == torch.float16 and not math.isfinite(sum(losses)):
        raise StartCheckError(f"{found}: {FLOAT16_LIMIT}")
    if not abs(losses[0] - losses[1]) <= tolerance * abs(losses[1]):  # False for NaN
        raise StartCheckError(f"{found}: they should be equal; set model.attention=sdpa, and report this machine to us")
    return f"{found}: equal"


def _loss(model: Any, batches: Sequence[dict[str, Any]]) -> float:
    """Return the mean loss over the trained tokens of all batches."""
    device = model.get_input_embeddings().weight.device
    total, count = 0.0, 0
    for batch in batches:
        batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        total += float(labelled_loss(model, batch)[0])
        count += count_labels(batch)
    return total / max(1, count)
