"""Near-duplicate images by the features of the vision tower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLD = 0.97
"""Cosine of two images' centred features from which they count as near-duplicates."""
_FEW = 8
"""Images below which the mean of all says nothing, and is not taken off."""
_BLOCK = 1024


@dataclass(frozen=True)
class NearPair:
    """Two images that are nearly the same, by their indices, and the cosine of their features."""

    one: int
    two: int
    cosine: float


def find_near_duplicates(features: Sequence[np.ndarray], threshold: float = THRESHOLD) -> list[NearPair]:
    """Find pairs of images whose features are nearly the same.

    Args:
        features: Averaged features of each image, from `average_patches`.
        threshold: Least cosine of a pair, after the mean of all images is taken off.

    Returns:
        The pairs, the nearest first.
    """
    if len(features) < 2:
        return []
    table = np.stack(features).astype(np.float32)
    if len(table) >= _FEW:
        table -= table.mean(axis=0)
    table /= np.linalg.norm(table, axis=1, keepdims=True) + 1e-9
    return sorted(_pairs(table, threshold), key=lambda pair: (-pair.cosine, pair.one, pair.two))


def _pairs(table: np.ndarray, threshold: float) -> Iterator[NearPair]:
    for start in range(0, len(table), _BLOCK):
        cosines = table[start : start + _BLOCK] @ table.T
        for row, column in np.argwhere(cosines >= threshold):
            one, two = start + int(row), int(column)
            if one < two:
                yield NearPair(one, two, min(1.0, float(cosines[row, column])))
