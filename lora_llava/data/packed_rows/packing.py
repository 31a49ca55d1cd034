"""Pack samples into rows of at most N tokens, in an order determined by the seed and the epoch."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Sequence

from lora_llava.core.errors import UserError

WINDOW = 4096
"""Samples that are packed together. A row's samples come from one window of the shuffled epoch, so that the epoch is
not sorted by length."""


def pack_samples(
    lengths: Sequence[int], max_tokens: int, *, seed: int = 0, epoch: int = 0, window: int = WINDOW
) -> list[list[int]]:
    """Pack samples into rows by best fit, longest first, within windows of the shuffled epoch; no sample is split.

    Args:
        lengths: Tokens of each sample.
        max_tokens: Most tokens of a row.
        seed: Seeds the shuffle, together with the epoch.
        epoch: From 0.
        window: Samples packed together.

    Returns:
        Rows of sample indices; every sample is in exactly one row, and no row is over `max_tokens`.

    Raises:
        UserError: If a sample is longer than a row.
    """
    longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    if longest is not None and lengths[longest] > max_tokens:
        raise UserError(
            f"sample {longest} has {lengths[longest]} tokens, over a row of {max_tokens}; raise "
            "training.max_tokens_per_row, or lower data.max_length"
        )
    generator = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    generator.shuffle(order)
    return pack_in_order(order, lengths, max_tokens, generator, window=window)


def pack_in_order(
    order: Sequence[int],
    lengths: Sequence[int],
    max_tokens: int,
    generator: random.Random,
    *,
    counts: Sequence[int] | None = None,
    most: float = math.inf,
    window: int = WINDOW,
) -> list[list[int]]:
    """Pack items, in windows of their order, into rows; the rows of a window are shuffled.

    Args:
        order: Indices of the items.
        lengths: Tokens of each item.
        max_tokens: Most tokens of a row.
        generator: Shuffles.
        counts: A second size of each item, limited by `most`; None has none.
        most: Most of the second size in a row.
        window: Items packed together.

    Returns:
        Rows of item indices.
    """
    rows: list[list[int]] = []
    for start in range(0, len(order), window):
        packed = _best_fit(order[start : start + window], lengths, max_tokens, counts, most)
        generator.shuffle(packed)  # otherwise every window would start with its longest samples
        rows += packed
    return rows


def _best_fit(
    items: Sequence[int], lengths: Sequence[int], max_tokens: int, counts: Sequence[int] | None, most: float
) -> list[list[int]]:
    """Put each item, longest first, into the fullest row that has room for it."""
    rows: list[list[int]] = []
    used: list[int] = []  # the second size of each row
    open_rows: list[tuple[int, int]] = []  # room left and row, sorted
    for item in sorted(items, key=lambda i: -lengths[i]):
        count = 0 if counts is None else counts[item]
        place = bisect.bisect_left(open_rows, (lengths[item], -1))
        while place < len(open_rows) and used[open_rows[place][1]] + count > most:
            place += 1
        if place == len(open_rows):
            rows.append([item])
            used.append(count)
            room, row = max_tokens - lengths[item], len(rows) - 1
        else:
            room, row = open_rows.pop(place)
            rows[row].append(item)
            used[row] += count
            room -= lengths[item]
        bisect.insort(open_rows, (room, row))
    return rows


def packing_efficiency(rows: Sequence[Sequence[int]], lengths: Sequence[int], max_tokens: int) -> float:
    """Return the share of the rows' capacity that holds tokens."""
    return sum(lengths[i] for row in rows for i in row) / (max_tokens * len(rows)) if rows else 1.0
