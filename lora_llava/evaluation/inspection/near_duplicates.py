"""Near-duplicate images by the features of the vision tower."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLD = 0.97
"""Cosine of two images' centred features from which they count as near-duplicates."""
_FEW = 8
"""Images below which the mean of all says nothing, and is not taken off."""
_BLOCK = 1024


@dataclass(frozen=True)
class NearGroup:
    """Images that are nearly the same, each as another one of the group or through others of it.

    Attributes:
        places: Their indices, in order.
        nearest: Of each, the index of the nearest other one.
        cosines: Of each, the cosine of its features and those of the nearest other one.
    """

    places: Sequence[int]
    nearest: Sequence[int]
    cosines: Sequence[float]


def find_near_duplicates(features: Sequence[np.ndarray], threshold: float = THRESHOLD) -> list[NearGroup]:
    """Find groups of images whose features are nearly the same.

    Args:
        features: Averaged features of each image, from `average_patches`.
        threshold: Least cosine of two images, after the mean of all images is taken off.

    Returns:
        The groups, the nearest first. Their memory grows with the images, not with the pairs.
    """
    if len(features) < 2:
        return []
    table = np.stack(features).astype(np.float32)
    if len(table) >= _FEW:
        table -= table.mean(axis=0)
    table /= np.linalg.norm(table, axis=1, keepdims=True) + 1e-9
    group, nearest, closeness = np.arange(len(table)), np.arange(len(table)), np.empty(len(table))
    for start in range(0, len(table), _BLOCK):
        cosines = table[start : start + _BLOCK] @ table.T
        for place, row in enumerate(cosines, start):
            near = row >= threshold
            near[place] = True
            if near.sum() > 1:
                group[np.isin(group, group[near])] = group[near].min()
            row[place] = -1.0
            nearest[place] = row.argmax()
            closeness[place] = min(1.0, float(row.max()))
    shared = [np.flatnonzero(group == each) for each, count in Counter(group.tolist()).items() if count > 1]
    found = [NearGroup(places.tolist(), nearest[places].tolist(), closeness[places].tolist()) for places in shared]
    return sorted(found, key=lambda each: (-max(each.cosines), each.places[0]))
