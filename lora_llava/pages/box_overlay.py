"""Boxes and their labels as they are drawn over an image of the gallery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lora_llava.pages.preview_samples import escape_hidden

EMPTY_FRAME = (400, 300)
"""Width and height of the frame in place of an image that cannot be shown."""
_WIDTH = 360
"""Units of an overlay's width, about one CSS pixel each on a wide page."""
_COLOURS = 8
"""Colours of labels, in turn; the style names them `b0` to `b7`."""
_CHARACTER, _TAG = 6.4, 16
"""Units of a character's width and of a tag's height."""
_LONGEST_LABEL = 24


@dataclass(frozen=True)
class LabelledBox:
    """A box.

    Attributes:
        label: Its category.
        corners: x1, y1, x2, y2 as fractions of the image's width and height.
    """

    label: str
    corners: tuple[float, float, float, float]


class BoxPlace(NamedTuple):
    """A rectangle, in units of the overlay."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top

    def overlaps(self, other: BoxPlace) -> bool:
        """Check whether two rectangles have an area in common."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


@dataclass(frozen=True)
class DrawnBox:
    """A box with its place and the number of its colour."""

    label: str
    place: BoxPlace
    colour: int


@dataclass(frozen=True)
class Tag:
    """A label's text, its place and the number of its colour."""

    text: str
    place: BoxPlace
    colour: int


@dataclass(frozen=True)
class Overlay:
    """What is drawn over an image.

    Attributes:
        width: In units.
        height: In units.
        boxes: From large to small, so that small ones are on top.
        tags: Labels that fit without covering each other.
    """

    width: int
    height: int
    boxes: Sequence[DrawnBox]
    tags: Sequence[Tag]


@dataclass(frozen=True)
class LabelCount:
    """A label, the number of its boxes and the number of its colour."""

    text: str
    count: int
    colour: int


def count_labels(boxes: Sequence[LabelledBox]) -> list[LabelCount]:
    """Count the boxes of each label, in the order of the first box of each."""
    counts: dict[str, int] = {}
    for box in boxes:
        counts[box.label] = counts.get(box.label, 0) + 1
    return [LabelCount(label, count, number % _COLOURS) for number, (label, count) in enumerate(counts.items())]


def place_boxes(boxes: Sequence[LabelledBox], width: int, height: int) -> Overlay:
    """Lay out boxes and their labels.

    Args:
        boxes: Boxes of one image.
        width: The image's, in pixels.
        height: The image's, in pixels.

    Returns:
        An overlay of the image's shape. A label without a free place at its box has no tag.
    """
    units = max(round(_WIDTH * height / width), 1)
    colours = {label.text: label.colour for label in count_labels(boxes)}
    drawn, tags = list[DrawnBox](), list[Tag]()
    for box in sorted(boxes, key=lambda box: -_area(box)):
        place = BoxPlace(*(x * size for x, size in zip(box.corners, (_WIDTH, units) * 2, strict=True)))
        drawn.append(DrawnBox(box.label, place, colours[box.label]))
        text = box.label if len(box.label) <= _LONGEST_LABEL else f"{box.label[:_LONGEST_LABEL]}…"
        free = _free_place(escape_hidden(text), place, units, tags)
        if free:
            tags.append(Tag(text, free, colours[box.label]))
    return Overlay(_WIDTH, units, drawn, tags)


def _area(box: LabelledBox) -> float:
    left, top, right, bottom = box.corners
    return (right - left) * (bottom - top)


def _free_place(text: str, box: BoxPlace, height: int, tags: Sequence[Tag]) -> BoxPlace | None:
    """Find a place for a tag above a box, inside its top or below it that no other tag covers."""
    width = len(text) * _CHARACTER
    x = max(min(box.left, _WIDTH - width - 8), 0)
    for y in (box.top - _TAG, box.top, box.bottom):
        place = BoxPlace(x, y, x + width + 8, y + _TAG)
        if 0 <= y <= height - _TAG and not any(place.overlaps(tag.place) for tag in tags):
            return place
    return None
