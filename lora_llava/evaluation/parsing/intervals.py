"""Confidence intervals of shares."""

from __future__ import annotations

from scipy.stats import binomtest

LEVEL = 0.95


def share_interval(correct: int, count: int) -> tuple[float, float]:
    """Compute Wilson's interval of a share (scipy.stats, BinomTestResult.proportion_ci).

    Args:
        correct: Number of correct answers.
        count: Number of answers.

    Returns:
        The lower and the upper end in percent; 0 and 100 for a count of 0.
    """
    if count == 0:
        return 0.0, 100.0
    found = binomtest(correct, count).proportion_ci(LEVEL, method="wilson")
    return 100 * float(found.low), 100 * float(found.high)
