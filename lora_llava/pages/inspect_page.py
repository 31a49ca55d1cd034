"""Rows and images that deserve a look, with their figures, on one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_llava.pages.embedded_image import EmbeddedImage
from lora_llava.pages.render import render


@dataclass(frozen=True)
class InspectItem:
    """A row, or a group of images.

    Attributes:
        split: Its split.
        name: The row's name, or the group's figure.
        labels: Why it is listed.
        images: Its images; None for one that cannot be opened.
        image_names: Their file names.
        question: The row's question.
        answer: The answer in the data.
        likelier: The answer that other rows point to; "" for none.
        figures: Labels and values.
    """

    split: str
    name: str
    labels: Sequence[str]
    images: Sequence[EmbeddedImage | None]
    image_names: Sequence[str]
    question: str = ""
    answer: str = ""
    likelier: str = ""
    figures: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class InspectList:
    """A list of the page.

    Attributes:
        key: Its name in links.
        title: Heading.
        count: Rows or groups, those not shown included.
        meaning: What it means to be in the list.
        drawn: How many are shown, if not all.
        items: What is shown.
    """

    key: str
    title: str
    count: int
    meaning: str
    drawn: str
    items: Sequence[InspectItem]


@dataclass(frozen=True)
class InspectPage:
    """The content of the page.

    Attributes:
        title: Heading.
        facts: Labels and values for the head.
        notes: What a reader should know first.
        lists: The lists.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    lists: Sequence[InspectList]


def render_inspect_page(page: InspectPage) -> str:
    """Render the page.

    Args:
        page: What to show; its texts may hold anything.

    Returns:
        One HTML document without scripts. It reaches no network: its Content-Security-Policy allows `data:` images
        and inline styles alone. It can be encoded as UTF-8.
    """
    return render("inspect.html.j2", title=page.title, page=page)
