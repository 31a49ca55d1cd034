"""The order of rows that share prefixes: the rows of a group are trained together, a few in each optimizer step."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from lora_llava.data.packed_rows.packing import WINDOW, pack_in_order
from lora_llava.data.packed_rows.shared_prefixes import SharedPrefixes

Run = list[int]
"""Rows of one group that are neighbours in a packed row and share their prefix there; or one row alone."""
_SHORTEST_WINDOW = 8
"""Fewest runs that are packed together."""
_TRIED = 1000
"""Rows that are tried as a swap for one whose step has too many rows of a group."""


@dataclass(frozen=True)
class Capacity:
    """What a packed row may have.

    Attributes:
        tokens: Most tokens, each shared prefix counted once; None if rows have a fixed number of samples.
        samples: Number of samples of a row, if `tokens` is None.
        unshared: Most tokens with each prefix counted for every sample that has it, so that an optimizer step has as
            many samples as without sharing.
        questions: Most rows of a group in an optimizer step.
    """

    tokens: int | None
    samples: int
    unshared: float
    questions: int


def shared_rows(
    chosen: Sequence[int], lengths: Sequence[int], shared: SharedPrefixes, capacity: Capacity, generator: random.Random
) -> list[list[int]]:
    """Order and pack the rows of an epoch, with the rows of a group in runs.

    The runs of a group are evenly spread over the epoch.

    Args:
        chosen: The rows of the epoch.
        lengths: Tokens of each row of the split.
        shared: The prefix of each row.
        capacity: Limits of a packed row.
        generator: Shuffles.

    Returns:
        The rows of each forward pass; every chosen row is in one of them.
    """
    runs = _shuffled_runs(chosen, lengths, shared, capacity, generator)
    places = range(len(runs))
    # Windows are short enough to have one run of a group.
    most_runs = max(Counter(group for run in runs if (group := shared.group(run[0])) is not None).values(), default=1)
    window = WINDOW if most_runs == 1 else min(WINDOW, max(_SHORTEST_WINDOW, len(runs) // (2 * most_runs)))
    if capacity.tokens is not None:
        tokens = [shared.tokens(run, lengths) for run in runs]
        unshared = [sum(lengths[i] for i in run) for run in runs]
        packed = pack_in_order(
            places, tokens, capacity.tokens, generator, counts=unshared, most=capacity.unshared, window=window
        )
        return [[i for place in row for i in runs[place]] for row in packed]
    packed = pack_in_order(places, [len(run) for run in runs], capacity.samples, generator, window=window)
    rows = [[i for place in row for i in runs[place]] for row in packed]
    # Rows that were not filled are joined and cut again, so that sharing changes no row's number of samples.
    full = [row for row in rows if len(row) == capacity.samples]
    rest = [i for row in rows if len(row) < capacity.samples for i in row]
    full += [rest[start : start + capacity.samples] for start in range(0, len(rest), capacity.samples)]
    last = [full.pop()] if len(full[-1]) < capacity.samples else []
    generator.shuffle(full)
    return full + last


def _shuffled_runs(
    chosen: Sequence[int], lengths: Sequence[int], shared: SharedPrefixes, capacity: Capacity, generator: random.Random
) -> list[Run]:
    """Cut each group into runs; the m runs of a group are 1/m of the epoch apart, from a random start."""
    groups: dict[object, list[int]] = {}
    for place, row in enumerate(chosen):
        group = shared.group(row)
        groups.setdefault(("alone", place) if group is None else group, []).append(row)
    placed: list[tuple[float, Run]] = []
    for members in groups.values():
        generator.shuffle(members)
        runs = _cut(members, lengths, shared, capacity)
        start = generator.random()
        placed += [((start + number) / len(runs), run) for number, run in enumerate(runs)]
    return [run for _, run in sorted(placed, key=lambda each: each[0])]


def _cut(members: Sequence[int], lengths: Sequence[int], shared: SharedPrefixes, capacity: Capacity) -> list[Run]:
    """Cut a group into as few runs of about equal size as fit; the prefix is repeated in each."""
    most = capacity.questions
    if capacity.tokens is None:
        most = min(most, capacity.samples)
        if len(members) > most:
            # Runs of a size that divides a row's number of samples fill rows without being cut.
            most = max([size for size in range(most // 2 + 1, most + 1) if capacity.samples % size == 0], default=most)
        return [list(members[start : start + most]) for start in range(0, len(members), most)]
    for count in range(math.ceil(len(members) / most), len(members) + 1):
        ends = [round(len(members) * number / count) for number in range(count + 1)]
        runs = [list(members[start:end]) for start, end in pairwise(ends)]
        if all(
            shared.tokens(run, lengths) <= capacity.tokens and sum(lengths[i] for i in run) <= capacity.unshared
            for run in runs
        ):
            return runs
    return [[row] for row in members]


def separate_groups(epochs: Sequence[list[list[int]]], size: int, shared: SharedPrefixes, most: int) -> list[list[int]]:
    """Swap packed rows of an epoch where an optimizer step has more than `most` rows of a group, as far as possible.

    Args:
        epochs: The packed rows of each epoch.
        size: Packed rows of an optimizer step.
        shared: The prefix of each row.
        most: Most rows of a group in a step.

    Returns:
        The packed rows of all epochs, in order.
    """
    rows = [row for epoch in epochs for row in epoch]
    place_of = [(start, len(epoch)) for start, epoch in zip(_starts(epochs), epochs, strict=True) for _ in epoch]
    counts = [Counter(shared.group(i) for i in row if shared.group(i) is not None) for row in rows]
    steps = [
        sum((counts[i] for i in _step(start // size, size, len(rows))), Counter())
        for start in range(0, len(rows), size)
    ]

    def fits(step: int, out: int, into: int) -> bool:
        """Check whether a step stays within `most` if row `out` is replaced by row `into`."""
        return all(steps[step][group] - counts[out][group] + count <= most for group, count in counts[into].items())

    for here, row in enumerate(rows):
        step = here // size
        if all(steps[step][group] <= most for group in counts[here]):
            continue
        # Try the next rows of the epoch, and from its end on those of its beginning.
        start, length = place_of[here]
        others = (start + (here - start + ahead) % length for ahead in range(1, min(length, _TRIED)))
        there = next(
            (i for i in others if i // size != step and fits(step, here, i) and fits(i // size, i, here)), None
        )
        if there is None:
            continue
        other = there // size
        steps[step] = steps[step] - counts[here] + counts[there]
        steps[other] = steps[other] - counts[there] + counts[here]
        rows[here], rows[there] = rows[there], row
        counts[here], counts[there] = counts[there], counts[here]
    return rows


def _starts(epochs: Sequence[list[list[int]]]) -> list[int]:
    """Return the index of the first row of each epoch in the run."""
    return [0, *accumulate(map(len, epochs))][:-1]


def _step(number: int, size: int, rows: int) -> range:
    return range(number * size, min(rows, (number + 1) * size))


def sample_groups(rows: Sequence[int], shared: SharedPrefixes, size: int, generator: random.Random) -> list[int]:
    """Draw complete groups, and rows without a group, such that about `size` rows are drawn."""
    share = size / max(1, len(rows))
    if share >= 1:
        return list(rows)
    drawn: dict[object, bool] = {}

    def is_drawn(place: int, row: int) -> bool:
        group = shared.group(row)
        key = ("alone", place) if group is None else group
        return drawn.setdefault(key, generator.random() < share)

    return [row for place, row in enumerate(rows) if is_drawn(place, row)] or list(rows[:1])


def run_order(count: int, shared: SharedPrefixes) -> list[int]:
    """Return all rows of a split in order, those of a group behind its first one."""
    first: dict[int, int] = {}

    def place(row: int) -> tuple[int, int]:
        group = shared.group(row)
        return (row if group is None else first.setdefault(group, row)), row

    return sorted(range(count), key=place)
