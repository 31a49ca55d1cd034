"""Intervals, against values worked out elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from lora_llava.evaluation.intervals import mean_interval, share_interval


def wilson(correct: int, count: int) -> tuple[float, float]:
    """By the formula itself (Wilson 1927), z of 97.5%."""
    z, share = 1.959963984540054, correct / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return 100 * (middle - half), 100 * (middle + half)


@pytest.mark.parametrize(("correct", "count"), [(0, 5), (5, 5), (171, 188), (1, 2), (4000, 4241)])
def test_wilson(correct: int, count: int) -> None:
    assert share_interval(correct, count) == pytest.approx(wilson(correct, count))


def test_a_share_of_nothing_says_nothing() -> None:
    assert share_interval(0, 0) == (0.0, 100.0)


def test_a_mean_lies_in_its_interval_and_more_values_narrow_it() -> None:
    few, many = [0.0, 1.0, 1.0, 0.5], [0.0, 1.0, 1.0, 0.5] * 50
    for values in (few, many):
        low, high = mean_interval(values)
        assert low < np.mean(values) < high
        assert mean_interval(values) == (low, high)
    assert np.diff(mean_interval(many)) < np.diff(mean_interval(few))


def test_against_another_resampling() -> None:
    values = list(np.random.default_rng(3).normal(size=400))
    other = bootstrap((np.array(values),), np.mean, rng=np.random.default_rng(9)).confidence_interval
    assert mean_interval(values) == pytest.approx((other.low, other.high), abs=0.02)


def test_one_value_is_all_there_is() -> None:
    assert mean_interval([3.0]) == (3.0, 3.0)
    assert mean_interval([2.0, 2.0]) == (2.0, 2.0)
    with pytest.raises(ValueError, match="needs values"):
        mean_interval([])
