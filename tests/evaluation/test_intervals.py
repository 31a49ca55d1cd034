"""Intervals, checked against values computed elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from lora_llava.evaluation.parsing.intervals import share_interval


def wilson(correct: int, count: int) -> tuple[float, float]:
    """By the formula itself (Wilson 1927), z of 97.5%."""
    z, share = 1.959963984540054, correct / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return 100 * (middle - half), 100 * (middle + half)


@pytest.mark.parametrize(("correct", "count"), [(0, 5), (5, 5), (171, 188), (1, 2), (4000, 4241)])
def test_wilson(correct: int, count: int) -> None:
    assert share_interval(correct, count) == pytest.approx(wilson(correct, count))


def test_a_share_of_nothing_has_the_full_interval() -> None:
    assert share_interval(0, 0) == (0.0, 100.0)
