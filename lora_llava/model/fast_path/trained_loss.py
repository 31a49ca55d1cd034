"""The loss on trained tokens, with logits for those tokens only, and for a part of them at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_llava.data.encode import IGNORE_INDEX

LOGITS_AT_ONCE = 2**23
"""Logits that are computed at once: 262 tokens of a vocabulary of 32,000, so that a step's peak is elsewhere."""


def tokens_at_once(vocabulary: int) -> int:
    """Return the number of tokens whose logits are computed at once."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def labelled_loss(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the cross-entropy of a batch's trained tokens; the head runs only on the positions that predict them.

    Args:
        model: A LLaVA, with or without adapters, alone or wrapped for several GPUs.
        inputs: A batch with `labels`, int64 of shape (rows, tokens); with `predictors`, of the same shape, where a
            token is predicted by another position than the one before it (`PackedCollator`).

    Returns:
        The summed loss, a float32 scalar, and the number of trained tokens that were predicted as the most likely.
    """
    inputs = dict(inputs)
    labels, predictors = inputs.pop("labels"), inputs.pop("predictors", None)
    columns = (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1) + 1
    positions = columns - 1 if predictors is None else predictors[0, columns]
    with _loss_in_head(model, labels[:, columns].flatten()) as correct:
        loss = model(**inputs | {"use_cache": False}, logits_to_keep=positions).logits
    return loss, correct[0]


@contextmanager
def _loss_in_head(model: Any, targets: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Make the head return the summed loss in place of logits within a `with` block.

    It computes a part of the positions at a time, whose logits are computed again in the backward pass. This is done
    in the head, since DDP and FSDP need the forward pass of the complete model.

    Args:
        model: As for `labelled_loss`.
        targets: The token to predict at each position that the head gets, int64 of shape (positions,).

    Yields:
        A list, which gets the number of positions where the target was the most likely.
    """
    model = getattr(model, "module", model)  # of DDP
    head, size = model.get_output_embeddings(), tokens_at_once(model.config.get_text_config().vocab_size)
    forward, own = head.forward, head.__dict__.get("forward")
    correct: list[torch.Tensor] = []

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        parts = zip(hidden.flatten(0, -2).split(size), targets.split(size), strict=True)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # no head has dropout
        found = [checkpoint(_part_loss, forward, *part, **options) for part in parts]
        losses, counts = zip(*found, strict=True)
        correct.append(torch.stack(counts).sum())
        return torch.stack(losses).sum()

    head.forward = loss
    try:
        yield correct
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def _part_loss(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = head(hidden)
    loss = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss, (logits.detach().argmax(-1) == targets).sum()


def count_labels(inputs: dict[str, Any]) -> int:
    """Count the trained tokens of a batch; the first token of a row is never predicted."""
    return int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
