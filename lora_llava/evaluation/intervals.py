"""How far a score may be off: intervals for shares and means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest, bootstrap

LEVEL = 0.95
_RESAMPLES = 2_000


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


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap of a mean (scipy.stats.bootstrap), resampled alike each time.

    Args:
        values: One a question.

    Returns:
        The lower and the upper end, in the values' unit; of fewer than two values, or of equal ones, the mean twice.

    Raises:
        ValueError: For no values.
    """
    if not len(values):
        raise ValueError("an interval needs values")
    mean = float(np.mean(values))
    if len(set(values)) < 2:
        return mean, mean
    found = bootstrap(
        (np.asarray(values, dtype=float),), np.mean, confidence_level=LEVEL, n_resamples=_RESAMPLES,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)
