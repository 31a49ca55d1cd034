"""An image with its boxes over it, as a figure of the gallery."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from lora_llava.data.images.reading import BadImageError, FolderImages
from lora_llava.pages.preview_samples import escape_hidden
from lora_llava.synthesis.contexts.context import Box, Context

IMAGE_SIZE = 480
"""Pixels of an image's longer side, at most."""
JPEG_QUALITY = 80
_SMALL = 128 * 128
"""Pixels up to which an image is kept as PNG, and drawn with its pixels to be seen."""
_FRAME = (400, 300)
"""Of an image that is not there."""
_WIDTH = 360
"""Units of an overlay's width, about a CSS pixel each where the page is wide."""
COLOURS = 8
"""That kinds of boxes take in turn, as the style names them: `b0` to `b7`."""
_LETTER, _TAG = 6.4, 16
"""Units of a letter's width and of a label's height."""
_LONGEST_LABEL = 24
_Place = tuple[float, float, float, float]
"""Left, top, right and bottom, in units."""


def draw_image(context: Context, folder: FolderImages | None) -> str:
    """Draw an image with its boxes over it, or, where it cannot be shown, the boxes on an empty frame.

    Args:
        context: The image's name and boxes.
        folder: Opens the image; None where there is none.

    Returns:
        An HTML figure; the image is in it, downscaled, as a data URI.
    """
    image, told = None, "no image folder was named"
    if folder:
        try:
            image = folder.open(context.image)
        except BadImageError as error:
            told = error.kind  # its message may hold a path
    width, height = image.size if image else _FRAME
    overlay = _overlay(context.boxes, max(round(_WIDTH * height / width), 1))
    caption = f"<figcaption><bdi>{_line(context.image)}</bdi>{'' if image else f': {told}'}</figcaption>"
    if image is None:
        return f'<figure><div class="image empty">{overlay}</div>{caption}</figure>'
    few = ' class="few"' if width * height <= _SMALL else ""
    element = f'<img{few} src="{_data_uri(image)}" width="{width}" height="{height}" alt="{_line(context.image)}">'
    return f'<figure><div class="image">{element}{overlay}</div>{caption}</figure>'


def _overlay(boxes: Sequence[Box], height: int) -> str:
    """The boxes, the large ones beneath, and their labels above all, none upon another."""
    colours = {label: number % COLOURS for number, label in enumerate(dict.fromkeys(box.label for box in boxes))}
    drawn, tags, taken = [], [], list[_Place]()
    for box in sorted(boxes, key=lambda box: -_area(box)):
        left, top, right, bottom = (x * size for x, size in zip(box.corners, (_WIDTH, height) * 2, strict=True))
        place = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" rx="2"'
        colour = f"b{colours[box.label]}"
        drawn.append(
            f'<g class="{colour}"><title>{_line(box.label)}</title><rect class="halo" {place}/><rect {place}/></g>'
        )
        text = escape_hidden(box.label if len(box.label) <= _LONGEST_LABEL else f"{box.label[:_LONGEST_LABEL]}…")
        width = len(text) * _LETTER
        x = max(min(left, _WIDTH - width - 8), 0)
        ways = [(x, y, x + width + 8, y + _TAG) for y in (top - _TAG, top, bottom) if 0 <= y <= height - _TAG]
        free = next((way for way in ways if not any(_overlap(way, other) for other in taken)), None)
        if free:  # else the label is told where the pointer rests on the box, and below the image
            taken.append(free)
            tags.append(_tag(text, free, colour))
    return f'<svg class="boxes" viewBox="0 0 {_WIDTH} {height}" aria-hidden="true">{"".join(drawn + tags)}</svg>'


def _area(box: Box) -> float:
    left, top, right, bottom = box.corners
    return (right - left) * (bottom - top)


def _overlap(one: _Place, other: _Place) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _tag(text: str, place: _Place, colour: str) -> str:
    left, top, right, bottom = place
    return (
        f'<g class="tag {colour}"><rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
        f'height="{bottom - top:.1f}" rx="2"/><text x="{left + 4:.1f}" y="{top + 12:.1f}" '
        f'textLength="{right - left - 8:.1f}" lengthAdjust="spacingAndGlyphs">{escape(text)}</text></g>'
    )


def _line(text: str) -> str:
    return escape(escape_hidden(text))


def _data_uri(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((IMAGE_SIZE, IMAGE_SIZE))
    kind = "png" if small.width * small.height <= _SMALL else "jpeg"
    stream = io.BytesIO()
    small.save(stream, kind.upper(), quality=JPEG_QUALITY, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
