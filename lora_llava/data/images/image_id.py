"""The identity of an image: its name in one source, or the index of its source and that name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class ImageId(NamedTuple):
    """The identity of an image among several sources.

    Attributes:
        source: The index of its source.
        name: Its name in that source.
    """

    source: int
    name: str


ImageName = str | ImageId
"""An image of a split: its name if the split has one source, an `ImageId` if it has several."""


def own_name(image: ImageName) -> str:
    """Return an image's name in its source."""
    return image if isinstance(image, str) else image.name


def own_names(images: Iterable[ImageName]) -> tuple[str, ...]:
    """Return the names of images of one source.

    Raises:
        TypeError: If an image is of several sources: without its source, its name may mean another image.
    """
    names = []
    for image in images:
        if isinstance(image, ImageId):
            raise TypeError(f"{image} is an image of several sources; give its name in one source")
        names.append(image)
    return tuple(names)


def saved_name(image: ImageName) -> str:
    """Return the text of an image's identity in files and hashes: its name, after `3|` if it is of source 3."""
    return image if isinstance(image, str) else f"{image.source}|{image.name}"
