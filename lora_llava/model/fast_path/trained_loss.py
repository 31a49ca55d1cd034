"""The loss on trained tokens, with logits for those tokens only."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from lora_llava.data.encode import IGNORE_INDEX


def labelled_loss(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the cross-entropy of a batch's trained tokens; the head runs only on the positions that predict them.

    Args:
        model: A LLaVA, with or without adapters.
        inputs: A batch with `labels`, int64 of shape (rows, tokens); with `predictors`, of the same shape, where a
            token is predicted by another position than the one before it (`PackedCollator`).

    Returns:
        The summed loss, a float32 scalar, and the number of trained tokens that were predicted as the most likely.
    """
    inputs = dict(inputs)
    labels, predictors = inputs.pop("labels"), inputs.pop("predictors", None)
    columns = (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1) + 1
    positions = columns - 1 if predictors is None else predictors[0, columns]
    logits = model(**inputs | {"use_cache": False}, logits_to_keep=positions).logits.flatten(0, 1)
    targets = labels[:, columns].flatten()
    loss = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss, (logits.detach().argmax(-1) == targets).sum()


def count_labels(inputs: dict[str, Any]) -> int:
    """Count the trained tokens of a batch; the first token of a row is never predicted."""
    return int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
