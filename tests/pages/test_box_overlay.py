"""Boxes lie where the image shows them, and their labels do not cover each other."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.pages.box_overlay import BoxPlace, LabelCount, LabelledBox, count_labels, place_boxes

CORNERS = st.tuples(*[st.integers(0, 50)] * 4).map(
    lambda x: (x[0] / 100, x[1] / 100, (x[0] + x[2] + 1) / 102, (x[1] + x[3] + 1) / 102)
)
LABELS = st.sampled_from(["dog", "traffic light", "a" * 40])


def test_a_box_and_its_label() -> None:
    overlay = place_boxes([LabelledBox("dog", (0.25, 0.5, 0.75, 1.0))], 400, 300)
    assert (overlay.width, overlay.height) == (360, 270)
    assert [(box.label, box.place, box.colour) for box in overlay.boxes] == [("dog", BoxPlace(90, 135, 270, 270), 0)]
    (tag,) = overlay.tags
    assert (tag.text, tag.colour) == ("dog", 0)
    assert tag.place == pytest.approx((90, 119, 117.2, 135))


def test_large_boxes_lie_below_small_ones() -> None:
    boxes = [LabelledBox("small", (0.1, 0.1, 0.2, 0.2)), LabelledBox("large", (0.0, 0.0, 1.0, 1.0))]
    assert [(box.label, box.colour) for box in place_boxes(boxes, 10, 10).boxes] == [("large", 1), ("small", 0)]


def test_labels_are_counted_and_share_eight_colours() -> None:
    corners = (0.0, 0.0, 1.0, 1.0)
    counts = count_labels([LabelledBox(str(number % 9), corners) for number in range(10)])
    assert counts == [LabelCount("0", 2, 0), *(LabelCount(str(n), 1, n % 8) for n in range(1, 9))]


@given(boxes=st.lists(st.tuples(LABELS, CORNERS), max_size=12))
def test_labels_do_not_cover_each_other(boxes: list[tuple[str, tuple[float, float, float, float]]]) -> None:
    labelled = [LabelledBox(label, corners) for label, corners in boxes]
    overlay = place_boxes(labelled, 400, 300)
    assert Counter(box.label for box in overlay.boxes) == Counter(label for label, _ in boxes)
    assert bool(overlay.tags) == bool(boxes)
    for number, tag in enumerate(overlay.tags):
        assert tag.place.left >= 0
        assert tag.place.top >= 0
        assert tag.place.right <= overlay.width
        assert tag.place.bottom <= overlay.height
        assert not any(tag.place.overlaps(other.place) for other in overlay.tags[:number])
