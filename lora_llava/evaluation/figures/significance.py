"""Whether a gain is beyond chance, in numbers and in a sentence, and how many more held-out rows would show it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_llava.evaluation.compare.comparison import mcnemar

LEVEL = 0.05
"""A gain with a smaller p value counts as beyond chance."""
_Z = 1.959964
"""Quantile of the standard normal distribution for a two-sided level of 5%."""
_Z_POWER = 0.841621
"""Quantile for a power of 80%."""
_MOST = 100_000
"""Above this number of rows, a sentence does not give the number."""


@dataclass(frozen=True)
class Gain:
    """The right answers of one set of answers against those of another to the same rows.

    Attributes:
        of: What is compared, such as `after`.
        over: What it is compared with, such as `majority`.
        rows: Number of rows.
        right: Rows that the first answers right.
        right_before: Rows that the second answers right.
        gained: Rows that only the first answers right.
        lost: Rows that only the second answers right.
        p: p value of McNemar's exact test, two-sided.
        needed: Further rows with which such a gain would be beyond chance, in 4 of 5 cases; None if the gain is beyond
            chance, or if there is none.
    """

    of: str
    over: str
    rows: int
    right: int
    right_before: int
    gained: int
    lost: int
    p: float
    needed: int | None

    @property
    def points(self) -> float:
        """The gain in percentage points."""
        return 100 * (self.gained - self.lost) / self.rows

    def as_dict(self) -> dict[str, Any]:
        """Return it for a JSON file, with the gain in points and whether it is beyond chance."""
        return {
            **self.__dict__,
            "points": round(self.points, 2),
            "beyond_chance": self.gained > self.lost and self.p < LEVEL,
        }


def measure_gain(of: str, over: str, first: Sequence[bool], second: Sequence[bool]) -> Gain:
    """Compare two sets of answers to the same rows.

    Args:
        of: Name of the first.
        over: Name of the second.
        first: Whether the first answers each row right.
        second: Whether the second does, in the same order.

    Raises:
        ValueError: Without rows, or for different numbers of rows.
    """
    if not first:
        raise ValueError("a gain needs at least one row")
    pairs = list(zip(first, second, strict=True))
    gained, lost = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    p = mcnemar(lost, gained)
    needed = None if p < LEVEL or gained <= lost else rows_needed(len(pairs), gained, lost) - len(pairs)
    return Gain(
        of, over, len(pairs), sum(first), sum(second), gained, lost, p, None if needed is None else max(1, needed)
    )


def rows_needed(rows: int, gained: int, lost: int) -> int:
    """Return the number of rows at which McNemar's test finds a gain like this one in 4 of 5 cases, at a level of 5%.

    The formula is Connor's (Biometrics 43, 1987), with the observed shares of rows gained and lost.

    Args:
        rows: Number of rows observed.
        gained: Those that only the first answers right; more than `lost`.
        lost: Those that only the second answers right.
    """
    changed, gain = (gained + lost) / rows, (gained - lost) / rows
    root = _Z * math.sqrt(changed) + _Z_POWER * math.sqrt(max(0.0, changed - gain**2))
    return math.ceil((root / gain) ** 2)


def in_points(points: float) -> str:
    """Format percentage points, such as `27.50 points` or `1 point`."""
    text = f"{abs(points):.2f}".rstrip("0").rstrip(".")
    return f"{text} point{'s' * (text != '1')}"


def describe_gain(gain: Gain, what: str, over: str, rows: str = "held-out rows") -> str:
    """Describe a gain in one sentence for a person.

    Args:
        gain: From `measure_gain`.
        what: What is compared, at the start of the sentence, such as `After training`.
        over: What it is compared with, such as `the majority answer`.
        rows: What the rows are, in the plural.
    """
    start = (
        f"{what}, {percent(gain.right, gain.rows)} of {gain.rows:,} {rows} are right, compared with "
        f"{percent(gain.right_before, gain.rows)} for {over}"
    )
    if gain.gained == gain.lost:
        return f"{start}: no gain."
    size = in_points(gain.points)
    if gain.p < LEVEL:
        kind = f"the gain of {size}" if gain.gained > gain.lost else f"the loss of {size}"
        return f"{start}: {kind} is beyond chance (McNemar's exact test, {write_p(gain.p)})."
    if gain.gained < gain.lost:
        return f"{start}: no gain, and the loss of {size} may be chance (McNemar's exact test, {write_p(gain.p)})."
    return (
        f"{start}: the gain of {size} may be chance (McNemar's exact test, {write_p(gain.p)}); "
        f"{_more(gain.needed or 1, rows)} would show a gain of this size in 4 of 5 cases."
    )


def percent(right: int, rows: int) -> str:
    """Format a share of rows in percent."""
    return f"{100 * right / rows:.2f}%"


def write_p(p: float) -> str:
    """Format a p value; one near the level with three decimals."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2f}" if round(p, 2) >= 0.06 else f"p = {p:.3f}"


def _more(needed: int, rows: str) -> str:
    if needed > _MOST:
        return f"more than {_MOST:,} further {rows}"
    digits = 10 ** max(0, len(str(needed)) - 2)
    rounded = math.ceil(needed / digits) * digits
    return f"about {rounded:,} more {rows if rounded != 1 else rows.removesuffix('s')}"
