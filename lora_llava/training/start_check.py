"""A check at every start: rows without padding give the padded rows' loss, on this very run's first batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lora_llava.core.errors import ToldError
from lora_llava.model.fast_path.trained_loss import count_labels, labelled_loss

_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Relative; what other shapes of the same sums change in each dtype, with room."""
_PADDED_SAMPLES = 2
"""The padded reference runs so many at a time, so that it takes less memory than the row it is compared with."""


class StartCheckError(ToldError):
    """Packed and padded rows do not give the same loss."""


@torch.no_grad()
def check_first_batch(
    model: Any, samples: Sequence[dict[str, Any]], padded: Callable[..., Any], packed: Callable[..., Any]
) -> str:
    """Run a batch padded and packed.

    Args:
        model: What is to be trained; left as it was.
        samples: Those of the first batch.
        padded: The reference collator.
        packed: The collator that trains.

    Returns:
        A line such as `packed 1.8234, padded 1.8234: equal`.

    Raises:
        StartCheckError: Where they differ by more than rounding.
    """
    training = model.training
    model.eval()
    pairs = [samples[start : start + _PADDED_SAMPLES] for start in range(0, len(samples), _PADDED_SAMPLES)]
    losses = [_loss(model, [packed(samples)]), _loss(model, [padded(pair) for pair in pairs])]
    model.train(training)
    found = f"packed {losses[0]:.4f}, padded {losses[1]:.4f}"
    tolerance = _TOLERANCES[model.get_input_embeddings().weight.dtype]
    if not abs(losses[0] - losses[1]) <= tolerance * abs(losses[1]):  # a NaN is no equality
        raise StartCheckError(f"{found}: they should be equal; set model.attention=sdpa, and tell us of this machine")
    return f"{found}: equal"


def _loss(model: Any, batches: Sequence[dict[str, Any]]) -> float:
    """The mean over the trained tokens of all batches."""
    device = model.get_input_embeddings().weight.device
    total, count = 0.0, 0
    for batch in batches:
        batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        total += float(labelled_loss(model, batch)[0])
        count += count_labels(batch)
    return total / max(1, count)
