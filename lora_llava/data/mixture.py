"""Mix several sources into one training set, by weights or numbers of rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lora_llava.core.errors import UserError


@dataclass(frozen=True)
class Share:
    """The share of a source in a mixture.

    Attributes:
        name: The source's name.
        weight: Its share of an epoch, in proportion to the other weights.
        rows: The number of its rows in an epoch, instead of a weight.
    """

    name: str
    weight: float | None = None
    rows: int | None = None


def epoch_counts(shares: Sequence[Share], available: Sequence[int], total: int | None) -> list[int]:
    """Compute the number of rows of each source in an epoch.

    Args:
        shares: The shares; a source with neither weight nor rows contributes all its rows.
        available: The number of rows that each source has.
        total: The number of rows of an epoch; None: all rows of the weighted sources, plus those of the others.

    Returns:
        Rows per source; if more than the source has, some are repeated within the epoch.

    Raises:
        UserError: If nothing of `total` is left for the weighted sources.
    """
    fixed = [share.rows if share.rows is not None else count for share, count in zip(shares, available, strict=True)]
    weighted = [i for i, share in enumerate(shares) if share.weight is not None]
    if not weighted:
        return fixed
    others = sum(count for i, count in enumerate(fixed) if i not in weighted)
    pool = sum(available[i] for i in weighted) if total is None else total - others
    if pool <= 0:
        raise UserError(
            f"data.max_train_rows is {total}, and sources without a weight already have {others} rows; raise it, or "
            "set fewer rows for those sources"
        )
    weights = [float(shares[i].weight or 0) for i in weighted]
    edges = [round(pool * sum(weights[: n + 1]) / sum(weights)) for n in range(len(weights))]
    counts = dict(zip(weighted, (high - low for low, high in zip([0, *edges], edges, strict=False)), strict=True))
    return [counts.get(i, count) for i, count in enumerate(fixed)]


def mixture(members: Sequence[Sequence[int]], counts: Sequence[int], seed: int) -> Callable[[int], list[int]]:
    """Return a function that draws the samples of each epoch.

    Every source is an endless sequence of shuffled passes, and each epoch takes the next part of it. So the counts of
    two samples of a source never differ by more than one, and rows that one epoch leaves out are in the next.

    Args:
        members: The sample indices of each source.
        counts: The number of samples of each source in an epoch.
        seed: Seeds the shuffles.

    Returns:
        A function from the epoch, counted from 0, to its samples; training shuffles their order.
    """

    def draw(epoch: int) -> list[int]:
        chosen: list[int] = []
        for source, (mine, count) in enumerate(zip(members, counts, strict=True)):
            chosen += _stretch(mine, epoch * count, count, f"{seed} {source}")
        return chosen

    return draw


def _stretch(mine: Sequence[int], start: int, count: int, seed: str) -> Iterable[int]:
    """Return `count` samples of the endless sequence of shuffled passes, from position `start`."""
    found: list[int] = []
    while len(found) < count and mine:
        passed, place = divmod(start + len(found), len(mine))
        order = list(mine)
        random.Random(f"{seed} {passed}").shuffle(order)
        found += order[place : place + count - len(found)]
    return found
