"""Pictures: opened lazily, never outside their folder, never from a URL, never larger than a cap."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, UnidentifiedImageError

from lora_llava.errors import UserError

_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
"""Pillow's own cap; the second is raised where warnings are errors."""


class BadImageError(UserError):
    """A picture that is missing, corrupt, too large or out of bounds."""


class ImageSource(Protocol):
    """Opens the pictures that conversations name."""

    def open(self, name: str) -> Image.Image:
        """Give one picture in RGB; BadImageError says what is wrong with it."""
        ...

    def read(self, name: str) -> bytes:
        """Give one picture's file, undecoded; BadImageError where there is none."""
        ...


Pictures = Callable[[Sequence[str]], torch.Tensor]
"""Gives the pictures of these names as a model's `pixel_values`, in order: pixels, or a tower's features of them."""


@dataclass(frozen=True)
class Pixels:
    """Opens pictures and preprocesses them.

    Args:
        images: Opens them.
        image_processor: The exported processor's, so that training and serving see the same pixels.
    """

    images: ImageSource
    image_processor: Any

    def __call__(self, names: Sequence[str]) -> torch.Tensor:
        """Pixels of these pictures, float32 of shape (pictures, 3, height, width)."""
        pictures = [self.images.open(name) for name in names]
        pixels: torch.Tensor = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return pixels


def read_rgb(file: Path | io.BytesIO, name: str, max_pixels: int) -> Image.Image:
    """Decode a picture to RGB.

    Args:
        file: A file or its bytes.
        name: Its name, for the message.
        max_pixels: Most pixels it may have; checked before decoding.

    Returns:
        An RGB picture, fully decoded.

    Raises:
        BadImageError: For anything that is not a whole picture of at most `max_pixels`.
    """
    try:
        with Image.open(file) as image:
            if image.width * image.height > max_pixels:
                raise BadImageError(
                    f"picture {name} has {image.width} x {image.height} pixels, over max_image_pixels {max_pixels}"
                )
            if image.mode == "P" and "transparency" in image.info:
                return image.convert("RGBA").convert("RGB")
            return image.convert("RGB")
    except FileNotFoundError:
        raise BadImageError(f"picture {name} is missing") from None
    except _TOO_LARGE as error:
        raise BadImageError(f"picture {name} is over max_image_pixels {max_pixels}: {error}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise BadImageError(f"picture {name} cannot be read: {error}") from None


class FolderImages:
    """Pictures under one folder.

    Args:
        root: The folder; nothing outside it is opened, through `..`, an absolute name or a link.
        max_pixels: Most pixels of a picture.
    """

    def __init__(self, root: Path, max_pixels: int) -> None:
        self.root = root.resolve()
        self.max_pixels = max_pixels

    def open(self, name: str) -> Image.Image:
        return read_rgb(self._find(name), name, self.max_pixels)

    def read(self, name: str) -> bytes:
        try:
            return self._find(name).read_bytes()
        except OSError as error:
            raise BadImageError(f"picture {name} cannot be read: {error.strerror}") from None

    def _find(self, name: str) -> Path:
        if "://" in name:
            raise BadImageError(f"picture {name} is a URL; only files under {self.root} are opened")
        try:
            path = (self.root / name).resolve()
        except ValueError as error:  # a NUL in the name
            raise BadImageError(f"picture {name!r} cannot be a file: {error}") from None
        if not path.is_relative_to(self.root):
            raise BadImageError(f"picture {name} lies outside {self.root}")
        return path


class TableImages:
    """Pictures in a column of a `datasets.Dataset`, named by their row.

    Args:
        table: A data set whose column `image` holds `{"bytes", "path"}` or None, undecoded.
        max_pixels: Most pixels of a picture.
    """

    def __init__(self, table: Any, max_pixels: int) -> None:
        self.table = table
        self.max_pixels = max_pixels

    def open(self, name: str) -> Image.Image:
        return read_rgb(io.BytesIO(self.read(name)), f"of row {name}", self.max_pixels)

    def read(self, name: str) -> bytes:
        content = self.table[int(name)]["image"]
        if not content or not content.get("bytes"):
            raise BadImageError(f"picture of row {name} is missing")
        return bytes(content["bytes"])
