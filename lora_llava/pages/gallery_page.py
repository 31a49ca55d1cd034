"""Samples and rejections of a set with their images, boxes and captions, on one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_llava.pages.box_overlay import (
    EMPTY_FRAME,
    LabelCount,
    LabelledBox,
    Overlay,
    count_labels,
    place_boxes,
)
from lora_llava.pages.embedded_image import EmbeddedImage
from lora_llava.pages.render import render

IMAGE_SIZE = 480
"""Pixels of an image's longer side, at most."""
JPEG_QUALITY = 80


@dataclass(frozen=True)
class MarkedText:
    """A text with at most one passage marked: what comes before it, the passage, and what follows."""

    before: str
    marked: str = ""
    after: str = ""


@dataclass(frozen=True)
class GalleryTurn:
    """A question or an answer."""

    kind: Literal["question", "answer"]
    text: MarkedText


@dataclass(frozen=True)
class GalleryRejection:
    """Why an answer was rejected: the reason, what it means, and what in the answer caused it."""

    reason: str
    meaning: str
    detail: str


@dataclass(frozen=True)
class GalleryEntry:
    """A sample, or a rejected answer.

    Attributes:
        kind: A flavour, or `rejected`.
        entry_id: Identifies the sample.
        attempt: Which attempt it is; "" where that is not shown.
        image_name: The image's file name.
        image: The image, if it can be shown.
        image_error: Why it cannot be shown.
        boxes: The image's boxes.
        captions: The image's captions.
        context: The text that the teacher was given.
        rejection: Why it was rejected; None for a sample.
        turns: Questions and answers.
        raw: The text of an answer that could not be parsed; None otherwise.
    """

    kind: str
    entry_id: str
    attempt: str
    image_name: str
    image: EmbeddedImage | None
    image_error: str
    boxes: Sequence[LabelledBox]
    captions: Sequence[str]
    context: str
    rejection: GalleryRejection | None
    turns: Sequence[GalleryTurn]
    raw: MarkedText | None

    @property
    def overlay(self) -> Overlay:
        """The boxes over the image or, without an image, over an empty frame."""
        size = (self.image.width, self.image.height) if self.image else EMPTY_FRAME
        return place_boxes(self.boxes, *size)

    @property
    def labels(self) -> list[LabelCount]:
        """The boxes' labels and how many boxes each has."""
        return count_labels(self.boxes)


@dataclass(frozen=True)
class FlavourRow:
    """Counts of a flavour: rows, tasks, and a value for each further column, None where it has no value."""

    flavour: str
    rows: int
    tasks: int
    values: Sequence[float | None]


@dataclass(frozen=True)
class FlavourTable:
    """A row for each flavour, and the titles of the columns after `flavour` and `rows`."""

    columns: Sequence[str]
    rows: Sequence[FlavourRow]


@dataclass(frozen=True)
class ReasonCount:
    """A reason of rejections, what it means, and the number of attempts it rejected."""

    reason: str
    meaning: str
    attempts: int


@dataclass(frozen=True)
class Gallery:
    """The content of a gallery.

    Attributes:
        title: Heading.
        facts: Labels and values for the head.
        notes: What a reader should know first.
        flavours: Counts by flavour.
        reasons: Counts by reason of rejection.
        choices: Kinds of entries that can be chosen, and the number of each; the first is `all`.
        drawn: How many of all samples and rejections are shown.
        entries: Samples, then rejections.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    flavours: FlavourTable
    reasons: Sequence[ReasonCount]
    choices: Sequence[tuple[str, int]]
    drawn: str
    entries: Sequence[GalleryEntry]


def render_gallery_page(gallery: Gallery) -> str:
    """Render the page.

    Args:
        gallery: What to show; its texts may hold anything.

    Returns:
        One HTML document without scripts. It reaches no network: its Content-Security-Policy allows `data:` images
        and inline styles alone. It can be encoded as UTF-8.
    """
    return render("gallery.html.j2", title=gallery.title, gallery=gallery)
