"""The order of a run: which samples share a forward pass, from the first step to the last."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from lora_llava.data.packing import pack_samples
from lora_llava.distributed.balance import distribute_rows
from lora_llava.recipe import TrainingSection

_MEGABATCH = 50
"""Batches in a window that is sorted by length (transformers, trainer_pt_utils.py, get_length_grouped_indices)."""


@dataclass(frozen=True)
class RowOrder:
    """The rows of a run, in order.

    Attributes:
        rows: Sample indices of every forward pass of the run; with several ranks, rank r runs `rows[r::ranks]`.
        steps: Optimizer steps.
        samples_per_step: Mean number of samples per step.
        tokens_per_row: Mean number of tokens per row, without padding.
        longest_row: Tokens of the longest row, without padding.
    """

    rows: list[list[int]]
    steps: int
    samples_per_step: float
    tokens_per_row: float
    longest_row: int


def exact_epochs(training: TrainingSection) -> Fraction:
    """Return the recipe's epochs as an exact fraction: 2.1 is 21/10, which a float cannot represent."""
    return Fraction(str(training.epochs))


def order_rows(
    training: TrainingSection,
    lengths: Sequence[int],
    *,
    seed: int,
    padded: bool,
    epochs: Callable[[int], Sequence[int]] | None = None,
    ranks: int = 1,
) -> RowOrder:
    """Order the rows of a run.

    A fraction of an epoch is that share of its rows, rounded up: 2.1 epochs of 100 rows are 210.

    The order depends on the recipe, the lengths and `padded` only, so a resumed run has the same order.

    Args:
        training: The recipe's section.
        lengths: Tokens of each training sample.
        seed: The recipe's seed.
        padded: Whether batches are padded; only those are grouped by length.
        epochs: Returns the samples of an epoch; None uses all samples.
        ranks: Processes that train together; each runs `gradient_accumulation` passes per step.

    Returns:
        The order.

    Raises:
        UserError: For a sample longer than `max_tokens_per_row`.
    """

    def epoch_rows(epoch: int) -> list[list[int]]:
        chosen = range(len(lengths)) if epochs is None else epochs(epoch)
        chosen_lengths = [lengths[i] for i in chosen]
        if training.max_tokens_per_row is not None:
            found = pack_samples(chosen_lengths, training.max_tokens_per_row, seed=seed, epoch=epoch)
        else:
            grouped = padded and training.group_by_length
            found = batch_samples(chosen_lengths, training.batch_size, seed=seed, epoch=epoch, grouped=grouped)
        return [[chosen[i] for i in row] for row in found]

    rows: list[list[int]] = []
    size = training.gradient_accumulation * ranks
    epoch, wanted = 0, math.inf if training.max_steps is None else training.max_steps * size
    passes = exact_epochs(training) if training.max_steps is None else None
    while (passes is None or epoch < passes) and len(rows) < wanted:
        new = epoch_rows(epoch)
        rows += new if passes is None else new[: math.ceil(len(new) * min(Fraction(1), passes - epoch))]
        epoch += 1
    rows = rows if training.max_steps is None else rows[: int(wanted)]
    rows = distribute_rows(
        rows,
        lengths,
        ranks=ranks,
        accumulation=training.gradient_accumulation,
        max_tokens=training.max_tokens_per_row,
        padded=padded,
    )
    steps = math.ceil(len(rows) / size)
    tokens = [sum(lengths[i] for i in row) for row in rows]
    return RowOrder(rows, steps, sum(map(len, rows)) / steps, sum(tokens) / len(rows), max(tokens))


def batch_samples(
    lengths: Sequence[int], batch_size: int, *, seed: int = 0, epoch: int = 0, grouped: bool = False
) -> list[list[int]]:
    """Return batches of a fixed number of samples, shuffled by seed and epoch.

    Args:
        lengths: Tokens of each sample.
        batch_size: Samples of a batch; the last may have fewer.
        seed: Seed of the shuffle, with the epoch.
        epoch: From 0.
        grouped: Put samples of similar length together, within shuffled windows of 50 batches.

    Returns:
        Batches of sample indices; every sample is in exactly one.
    """
    generator = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    generator.shuffle(order)
    if grouped:
        window = _MEGABATCH * batch_size
        order = [
            sample
            for start in range(0, len(order), window)
            for sample in sorted(order[start : start + window], key=lambda i: -lengths[i])
        ]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if grouped:
        generator.shuffle(batches)
    return batches


def validation_rows(training: TrainingSection, lengths: Sequence[int]) -> list[list[int]]:
    """Return the forward passes of a validation: in order, with the row size of training."""
    if training.max_tokens_per_row is not None:
        return pack_samples(lengths, training.max_tokens_per_row)
    indices = list(range(len(lengths)))
    return [indices[start : start + training.batch_size] for start in range(0, len(indices), training.batch_size)]
