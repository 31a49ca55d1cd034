"""Distribute rows to ranks, so that each rank has about as many tokens in every optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Rows = list[list[int]]


def distribute_rows(
    rows: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    ranks: int,
    accumulation: int = 1,
    max_tokens: int | None = None,
    padded: bool = False,
) -> Rows:
    """Redistribute the rows of each optimizer step over ranks.

    A step keeps the samples that it has with one rank, and every rank runs the same number of forward passes.

    Args:
        rows: Sample indices of every forward pass of all ranks, in order; `ranks * accumulation` rows are a step.
        lengths: Tokens of each sample.
        ranks: Processes that train together.
        accumulation: Forward passes of a rank in a step; the last step may have fewer.
        max_tokens: Most tokens of a row; None if rows are batches, which have a fixed number of samples.
        padded: Whether the samples of a row are padded to the longest one; similar lengths are then grouped.

    Returns:
        The rows; rank r runs `rows[r::ranks]`. With one rank they are unchanged. In the last step, rows may be empty if
        there are fewer samples than passes; few empty rows matter more than an even load.
    """
    if ranks == 1:
        return [list(row) for row in rows]
    size = ranks * accumulation
    steps = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [row for step in steps for row in _distribute_step(step, lengths, ranks, max_tokens, padded)]


def rank_tokens(rows: Sequence[Sequence[int]], lengths: Sequence[int], ranks: int) -> list[int]:
    """Return the tokens of each rank in the rows of one step."""
    return [_tokens([i for row in rows[rank::ranks] for i in row], lengths) for rank in range(ranks)]


def _distribute_step(
    step: Sequence[Sequence[int]], lengths: Sequence[int], ranks: int, max_tokens: int | None, padded: bool
) -> Rows:
    """Distribute one step: of up to three ways, take the one with the fewest empty rows, then the most even load."""
    # Add empty rows until every rank has as many passes.
    passes = math.ceil(len(step) / ranks)
    empty: Rows = [[] for _ in range(ranks * passes - len(step))]
    kept = [list(row) for row in step] + empty
    samples = [i for row in step for i in row]
    limit = math.inf if max_tokens is None else max_tokens
    # Most samples of a row: packed rows are limited by tokens only, batches keep their size.
    count = len(samples) if max_tokens is not None else max(map(len, step))
    # The rows with samples swapped between them, and the rows as they are.
    found = [_to_ranks(_level(kept, lengths, count), lengths, ranks), kept]
    # Distribute all samples again: to ranks if rows are padded (their rows are cut afterwards), else to rows.
    shares = _spread(samples, lengths, ranks if padded else len(kept), limit, count * passes if padded else count)
    if shares is not None and padded:
        found.insert(0, _interleave([_grouped(share, lengths, passes) for share in shares]))
    elif shares is not None:
        found.insert(0, _to_ranks(_level(shares, lengths, count), lengths, ranks))
    return min(found, key=lambda rows: (rows.count([]), max(rank_tokens(rows, lengths, ranks))))


def _spread(samples: Sequence[int], lengths: Sequence[int], bins: int, limit: float, count: int) -> Rows | None:
    """Put each sample into the lightest bin with room, longest first (the LPT rule); None if one does not fit."""
    rows: Rows = [[] for _ in range(bins)]
    loads = [0] * bins
    for sample in sorted(samples, key=lambda i: -lengths[i]):
        room = [b for b in range(bins) if len(rows[b]) < count and loads[b] + lengths[sample] <= limit]
        if not room:
            return None
        lightest = min(room, key=loads.__getitem__)
        rows[lightest].append(sample)
        loads[lightest] += lengths[sample]
    return rows


def _level(rows: Rows, lengths: Sequence[int], count: int) -> Rows:
    """Move or swap samples between the heaviest row and lighter ones until no change makes it lighter."""
    rows = [list(row) for row in rows]
    loads = [_tokens(row, lengths) for row in rows]
    while True:
        # Try the lightest row first, and take the first row with which a swap helps.
        *others, heavy = sorted(range(len(rows)), key=loads.__getitem__)
        found = ((b, _best_swap(rows[heavy], rows[b], lengths, loads[heavy] - loads[b], count)) for b in others)
        light, swap = next(((b, swap) for b, swap in found if swap is not None), (heavy, None))
        if swap is None:
            return rows
        for sample, source, target in ((swap[0], heavy, light), (swap[1], light, heavy)):
            if sample is not None:
                rows[source].remove(sample)
                rows[target].append(sample)
                loads[source] -= lengths[sample]
                loads[target] += lengths[sample]


def _best_swap(
    heavy: Sequence[int], light: Sequence[int], lengths: Sequence[int], gap: int, count: int
) -> tuple[int, int | None] | None:
    """Return the sample to give and the one to take back, if any, that leave the smallest gap; None if none helps."""
    back: list[int | None] = list(light)
    if len(heavy) > 1 and len(light) < count:
        back.append(None)
    # Moving `change` tokens from one row to the other changes the gap by twice as much.
    changes = [(a, b, lengths[a] - (0 if b is None else lengths[b])) for a in heavy for b in back]
    better = [(abs(2 * change - gap), a, b) for a, b, change in changes if 0 < change < gap]
    return min(better, key=lambda one: one[0])[1:] if better else None


def _to_ranks(rows: Rows, lengths: Sequence[int], ranks: int) -> Rows:
    """Give each row to the lightest rank that still needs one, heaviest row first."""
    passes = len(rows) // ranks
    shares: list[Rows] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for row in sorted(rows, key=lambda row: -_tokens(row, lengths)):
        rank = min((r for r in range(ranks) if len(shares[r]) < passes), key=loads.__getitem__)
        shares[rank].append(row)
        loads[rank] += _tokens(row, lengths)
    return _interleave(shares)


def _grouped(samples: Sequence[int], lengths: Sequence[int], passes: int) -> Rows:
    """Cut a rank's samples into its passes, similar lengths together."""
    order = sorted(samples, key=lambda i: -lengths[i])
    ends = [round(len(order) * n / passes) for n in range(passes + 1)]
    return [order[start:end] for start, end in pairwise(ends)]


def _interleave(shares: Sequence[Rows]) -> Rows:
    """Order the rows of all ranks such that rank r has `rows[r::ranks]`."""
    return [row for group in zip(*shares, strict=True) for row in group]


def _tokens(row: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in row)
