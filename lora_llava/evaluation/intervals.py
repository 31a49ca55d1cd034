"""How far a share may be off."""

from __future__ import annotations

from scipy.stats import binomtest

LEVEL = 0.95


def share_interval(correct: int, count: int) -> tuple[float, float]:
    """Wilson's interval of a share (scipy.stats, BinomTestResult.proportion_ci).

    Args:
        correct: How many of them.
        count: Of how many.

    Returns:
        The lower and the upper end in percent; of nothing, 0 and 100.
    """
    if count == 0:
        return 0.0, 100.0
    found = binomtest(correct, count).proportion_ci(LEVEL, method="wilson")
    return 100 * float(found.low), 100 * float(found.high)
