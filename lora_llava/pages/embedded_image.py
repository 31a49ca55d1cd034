"""Images as `data:` URIs, so that a page needs no other file."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

SMALL = 128 * 128
"""Most pixels of an image that is kept as PNG: JPEG artefacts would show where few pixels are enlarged."""


@dataclass(frozen=True)
class EmbeddedImage:
    """An image inside a page.

    Attributes:
        uri: A `data:` URI.
        width: In pixels, before the image was made smaller.
        height: In pixels, before the image was made smaller.
    """

    uri: str
    width: int
    height: int

    @property
    def is_small(self) -> bool:
        """Whether the page enlarges it, so that its pixels show."""
        return self.width * self.height <= SMALL


def embed_image(image: Image.Image, quality: int, longest_side: int | None = None) -> EmbeddedImage:
    """Encode an image for a page.

    Args:
        image: Of any mode and size; it is not changed.
        quality: Of a JPEG, from 1 to 95.
        longest_side: Pixels of the longer side, at most; None keeps the size.
    """
    small = image.convert("RGB")
    if longest_side:
        small.thumbnail((longest_side, longest_side))
    kind = "png" if small.width * small.height <= SMALL else "jpeg"
    stream = io.BytesIO()
    small.save(stream, kind.upper(), quality=quality, optimize=True)
    data = base64.b64encode(stream.getvalue()).decode()
    return EmbeddedImage(f"data:image/{kind};base64,{data}", *image.size)
