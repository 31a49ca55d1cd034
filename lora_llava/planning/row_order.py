"""The order of a run: which samples share a forward pass, from the first step to the last."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from lora_llava.data.packed_rows.packing import pack_samples
from lora_llava.data.packed_rows.shared_prefixes import SharedPrefixes
from lora_llava.distributed.balance import distribute_rows
from lora_llava.planning.shared_order import Capacity, run_order, sample_groups, separate_groups, shared_rows
from lora_llava.recipe import TrainingSection

_MEGABATCH = 50
"""Batches in a window that is sorted by length (transformers, trainer_pt_utils.py, get_length_grouped_indices)."""

_SAMPLE = 20_000
"""Samples from which the number of rows of a step is chosen."""


@dataclass(frozen=True)
class RowOrder:
    """The rows of a run, in order.

    Attributes:
        rows: Sample indices of every forward pass of the run; with several ranks, rank r runs `rows[r::ranks]`.
        steps: Optimizer steps.
        samples_per_step: Mean number of samples per step.
        tokens_per_row: Mean number of tokens per row, without padding; a shared prefix is counted once.
        longest_row: Tokens of the longest row, without padding.
        accumulation: Rows of a rank in an optimizer step.
        shared: The prefixes that samples share; None if none is shared.
    """

    rows: list[list[int]]
    steps: int
    samples_per_step: float
    tokens_per_row: float
    longest_row: int
    accumulation: int = 1
    shared: SharedPrefixes | None = None


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
    shared: SharedPrefixes | None = None,
) -> RowOrder:
    """Order the rows of a run.

    A fraction of an epoch is that share of its rows, rounded up: 2.1 epochs of 100 rows are 210.

    The order depends on the recipe, the lengths, the prefixes and `padded` only, so a resumed run has the same order.

    Where samples share prefixes, rows have room for more samples, and a step has fewer rows in turn: its number of
    samples, on which learning rates depend, stays about the same.

    Args:
        training: The recipe's section.
        lengths: Tokens of each training sample.
        seed: The recipe's seed.
        padded: Whether batches are padded; only those are grouped by length.
        epochs: Returns the samples of an epoch; None uses all samples.
        ranks: Processes that train together; each runs `gradient_accumulation` passes per step.
        shared: The prefixes that samples share; ignored if batches are padded.

    Returns:
        The order.

    Raises:
        UserError: For a sample longer than `max_tokens_per_row`.
    """
    shared = None if padded or shared is None or not shared.rows() else shared
    chosen = epochs or (lambda epoch: range(len(lengths)))

    def plain(epoch: int) -> list[list[int]]:
        return _plain_rows(training, chosen(epoch), lengths, seed=seed, epoch=epoch, padded=padded)

    capacity, accumulation = None, training.gradient_accumulation
    if shared is not None:
        capacity, accumulation = _capacity(training, chosen(0), lengths, shared, seed)

    def epoch_rows(epoch: int) -> list[list[int]]:
        if shared is None or capacity is None:
            return plain(epoch)
        return shared_rows(chosen(epoch), lengths, shared, capacity, random.Random(f"{seed} {epoch}"))

    size = accumulation * ranks
    packed = _all_epochs(training, epoch_rows, size)
    if shared is None:
        rows = [row for epoch in packed for row in epoch]
    else:
        rows = separate_groups(packed, size, shared, training.questions_per_image)
    rows = _distribute(
        rows,
        lengths,
        shared,
        ranks=ranks,
        accumulation=accumulation,
        max_tokens=training.max_tokens_per_row,
        padded=padded,
    )
    steps = math.ceil(len(rows) / size)
    tokens = [row_tokens(row, lengths, shared) for row in rows]
    mean = sum(tokens) / len(rows)
    return RowOrder(rows, steps, sum(map(len, rows)) / steps, mean, max(tokens), accumulation, shared)


def _plain_rows(
    training: TrainingSection, chosen: Sequence[int], lengths: Sequence[int], *, seed: int, epoch: int, padded: bool
) -> list[list[int]]:
    """Return the rows of an epoch in which nothing is shared."""
    chosen_lengths = [lengths[i] for i in chosen]
    if training.max_tokens_per_row is not None:
        found = pack_samples(chosen_lengths, training.max_tokens_per_row, seed=seed, epoch=epoch)
    else:
        grouped = padded and training.group_by_length
        found = batch_samples(chosen_lengths, training.batch_size, seed=seed, epoch=epoch, grouped=grouped)
    return [[chosen[i] for i in row] for row in found]


def _capacity(
    training: TrainingSection, chosen: Sequence[int], lengths: Sequence[int], shared: SharedPrefixes, seed: int
) -> tuple[Capacity, int]:
    """Return the limits of rows that share prefixes, and the rows of a step.

    Of the numbers of rows up to `gradient_accumulation`, it is the smallest whose steps have about as many samples as
    steps without sharing, or else comes closest; both are counted on a sample of the epoch.
    """
    budget, accumulation = training.max_tokens_per_row, training.gradient_accumulation
    capacity = Capacity(budget, training.batch_size, math.inf, training.questions_per_image)
    if budget is None:
        return capacity, accumulation
    sample = sample_groups(chosen, shared, _SAMPLE, random.Random(f"{seed} sample"))
    plain = len(pack_samples([lengths[i] for i in sample], budget, seed=seed))
    ways = []
    for count in range(1, accumulation + 1):
        limited = replace(capacity, unshared=budget * accumulation / count)
        packed = len(shared_rows(sample, lengths, shared, limited, random.Random(f"{seed} 0")))
        samples = (count / packed) / (accumulation / plain)  # of a step, as a multiple of those without sharing
        ways.append((round(abs(math.log(samples)), 1), count, limited))
    _, count, limited = min(ways, key=lambda way: way[:2])
    return limited, count


def _all_epochs(
    training: TrainingSection, epoch_rows: Callable[[int], list[list[int]]], size: int
) -> list[list[list[int]]]:
    """Return the rows of each epoch of a run; `size` rows are a step."""
    packed: list[list[list[int]]] = []
    wanted = math.inf if training.max_steps is None else training.max_steps * size
    passes = exact_epochs(training) if training.max_steps is None else None
    while (passes is None or len(packed) < passes) and wanted > 0:
        new = epoch_rows(len(packed))
        if passes is not None:
            new = new[: math.ceil(len(new) * min(Fraction(1), passes - len(packed)))]
        elif len(new) > wanted:
            new = new[: int(wanted)]
        wanted -= len(new)
        packed.append(new)
    return packed


def _distribute(
    rows: list[list[int]],
    lengths: Sequence[int],
    shared: SharedPrefixes | None,
    *,
    ranks: int,
    accumulation: int,
    max_tokens: int | None,
    padded: bool,
) -> list[list[int]]:
    """Distribute rows over ranks, see `distribute_rows`; the samples of a shared prefix stay together."""
    if shared is None or ranks == 1:
        return distribute_rows(
            rows, lengths, ranks=ranks, accumulation=accumulation, max_tokens=max_tokens, padded=padded
        )
    runs = [shared.runs(row) for row in rows]
    every = [run for row in runs for run in row]
    numbers = iter(range(len(every)))
    numbered = [[next(numbers) for _ in row] for row in runs]
    tokens = [shared.tokens(run, lengths) for run in every]
    limit = max_tokens or max(shared.tokens(row, lengths) for row in rows)
    found = distribute_rows(numbered, tokens, ranks=ranks, accumulation=accumulation, max_tokens=limit)
    return [[i for number in row for i in every[number]] for row in found]


def row_tokens(row: Sequence[int], lengths: Sequence[int], shared: SharedPrefixes | None) -> int:
    """Return the tokens of a row without padding; a prefix that its samples share is counted once."""
    return sum(lengths[i] for i in row) if shared is None else shared.tokens(row, lengths)


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


def validation_rows(
    training: TrainingSection,
    lengths: Sequence[int],
    *,
    shared: SharedPrefixes | None = None,
    ranks: int = 1,
    padded: bool = False,
) -> list[list[int]]:
    """Return the forward passes of a validation: in order, with the row size of training.

    Args:
        training: The recipe's section.
        lengths: Tokens of each sample.
        shared: The prefixes that samples share; ignored if batches are padded.
        ranks: Processes; rank r runs `rows[r::ranks]`.
        padded: Whether batches are padded.
    """
    shared = None if padded else shared
    budget, size = training.max_tokens_per_row, training.batch_size
    order = list(range(len(lengths))) if shared is None else run_order(len(lengths), shared)
    if budget is None:
        rows = [order[start : start + size] for start in range(0, len(order), size)]
    elif shared is None:
        rows = pack_samples(lengths, budget)
    else:
        capacity = Capacity(budget, size, math.inf, training.questions_per_image)
        rows = shared_rows(order, lengths, shared, capacity, random.Random("0 0"))
    return _distribute(rows, lengths, shared, ranks=ranks, accumulation=1, max_tokens=budget, padded=padded)
