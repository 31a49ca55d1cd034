"""A check at every start: rows without padding give the padded rows' loss, on this very run's first samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from lora_llava.data.encode import IGNORE_INDEX
from lora_llava.errors import ToldError

_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Relative; what other shapes of the same sums change in each dtype, with room."""


class StartCheckError(ToldError):
    """Packed and padded rows do not give the same loss."""


@torch.no_grad()
def check_first_batch(
    model: Any, rows: Sequence[dict[str, Any]], padded: Callable[..., Any], packed: Callable[..., Any]
) -> str:
    """Run some rows padded and packed.

    Args:
        model: What is to be trained; left as it was.
        rows: Two or more samples, or one could not see another.
        padded: The reference collator.
        packed: The collator that trains.

    Returns:
        A line such as `packed 1.8234, padded 1.8234: equal`.

    Raises:
        StartCheckError: Where they differ by more than rounding.
    """
    training = model.training
    model.eval()
    losses = [_loss(model, collate(rows)) for collate in (packed, padded)]
    model.train(training)
    found = f"packed {losses[0]:.4f}, padded {losses[1]:.4f}"
    tolerance = _TOLERANCES[model.get_input_embeddings().weight.dtype]
    if not abs(losses[0] - losses[1]) <= tolerance * abs(losses[1]):  # a NaN is no equality
        raise StartCheckError(f"{found}: they should be equal; set model.attention=sdpa, and tell us of this machine")
    return f"{found}: equal"


def _loss(model: Any, batch: dict[str, Any]) -> float:
    device = model.get_input_embeddings().weight.device
    batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    labels = batch.pop("labels")[:, 1:].flatten()
    logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
    return float(F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX))
