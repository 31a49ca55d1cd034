"""Convert decoded images of every mode to 8-bit RGB: scale deep values, composite transparency."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

Background = Literal["white", "black", "llava"]
"""The background of transparent parts; `llava` drops transparency, as LLaVA's `convert("RGB")` does."""
CONVERSION_RULE = 1
"""Increase it when the pixels of a file change: caches depend on it."""
TRANSPARENT, SCALED = "image with transparency", "image of more than 8 bits"
"""Kinds of notes."""

_DEPTHS = (8, 10, 12, 14, 16)
"""Bit depths of cameras and scanners."""
_NARROW = 16
"""An image whose values use less than this fraction (1/16) of its depth is scaled by its own range."""
_BLOCK = 1 << 20
"""Values converted at a time, so that memory does not grow with the image."""
_LOW_BYTES = {"16B": "16L", "16L": "16B", "16N": "16B" if np.little_endian else "16L"}
"""Pillow's 16-bit layouts that read the high byte, and for each the layout that reads the low byte instead."""


@dataclass(frozen=True)
class Converted:
    """An RGB image and notes on its conversion.

    Attributes:
        image: Mode RGB.
        notes: Pairs of kind and description.
    """

    image: Image.Image
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Range:
    """The values mapped to black and to white."""

    black: float
    white: float

    def __str__(self) -> str:
        return f"{self.black:g} is black and {self.white:g} is white"


def to_rgb(image: Image.Image, background: Background = "white") -> Converted:
    """Convert an opened image to 8-bit RGB.

    Values beyond 8 bits are scaled by one of two rules. Integers from 0 on: white is the largest value of the smallest
    of 8, 10, 12, 14 and 16 bits that holds the image's maximum, and black is 0; floats between 0 and 1: white is 1. All
    others (negative or larger values, other floats, values that use less than a sixteenth of that range): the image's
    smallest finite value is black and its largest white. NaN and -inf are black, +inf is white.

    Args:
        image: An image opened by Pillow; it may be undecoded.
        background: The background of transparent parts.

    Returns:
        The image, and notes on scaling and compositing.
    """
    content = _content_of_deep(image)
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        converted, alpha, note = _deep_grey(image)
    else:
        converted, alpha, note = _deep_colour(image, content)
    notes = [note] if note else []
    if alpha is None and converted.has_transparency_data:
        converted = (converted.convert("LA") if converted.mode == "La" else converted).convert("RGBA")
        alpha = converted.getchannel("A")
    rgb = _plain_rgb(converted)
    if alpha is None or _lowest(alpha) == 255:
        return Converted(rgb, tuple(notes))
    if background == "llava":
        notes.append((TRANSPARENT, "has transparent parts; they show the colours stored under them"))
        return Converted(rgb, tuple(notes))
    behind = Image.new("RGB", rgb.size, background)
    behind.paste(rgb, (0, 0), alpha)
    notes.append((TRANSPARENT, f"has transparent parts; it is composited on {background} (data.background)"))
    return Converted(behind, tuple(notes))


def _plain_rgb(image: Image.Image) -> Image.Image:
    """Convert with Pillow, via RGBA for a palette with transparency, which otherwise causes a warning."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _lowest(alpha: Image.Image) -> int:
    lowest: Any = alpha.getextrema()[0]
    return int(lowest)


def _deep_grey(image: Image.Image) -> tuple[Image.Image, Image.Image | None, tuple[str, str] | None]:
    """Convert a grey image of 16 or 32 bits or floats to 8 bits, with the alpha channel of its transparent value."""
    values = np.asarray(image)
    scale = _range_of(values, values.dtype.kind == "f")
    grey = Image.fromarray(_scaled(values, scale))
    alpha = None
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        alpha = Image.fromarray(np.where(values == clear, np.uint8(0), np.uint8(255)))
    if scale == _Range(0, 255) and values.dtype.kind != "f":
        return grey, alpha, None
    return grey, alpha, (SCALED, f"has mode {image.mode}; it is scaled so that {scale}")


def _deep_colour(
    image: Image.Image, content: bytes | None
) -> tuple[Image.Image, Image.Image | None, tuple[str, str] | None]:
    """Convert an image with several channels; if the file has 16 bits each and uses few of them, scale it as grey
    images.

    Pillow keeps the high byte of each value, which is correct if all 16 bits are used.
    """
    if content is None:
        return image, None, None
    high = np.asarray(image)
    has_alpha, clear = image.mode == "RGBA", image.info.get("transparency")
    largest = int(high[..., :3].max())
    full = largest >= 64 and largest - int(high[..., :3].min()) >= 256 // _NARROW
    if full and clear is None:
        return image, None, None
    low = _low_bytes(content, image.mode)
    values = high.astype(np.uint16) << 8 | (high if low is None else low)
    colours = values[..., :3]
    scale = _range_of(colours, False)
    rgb = Image.fromarray(_scaled(colours, scale))
    alpha = None
    if has_alpha:
        alpha = Image.fromarray(_scaled(values[..., 3], _alpha_range(values[..., 3], scale)))
    elif isinstance(clear, tuple):
        hidden = (values == np.array(clear, dtype=np.uint16)).all(axis=-1)
        alpha = Image.fromarray(np.where(hidden, np.uint8(0), np.uint8(255)))
    return rgb, alpha, None if full else (SCALED, f"has 16 bits per channel; it is scaled so that {scale}")


def _alpha_range(alpha: np.ndarray, colours: _Range) -> _Range:
    """Return the range of alpha: up to the colours' white if alpha has no larger value, else 16 bits."""
    fits = colours.black == 0 and int(alpha.max()) <= colours.white
    return _Range(0, colours.white if fits else 65535)


def _content_of_deep(image: Image.Image) -> bytes | None:
    """Return the file of an undecoded image with 16 bits per channel; None for any other."""
    tiles = getattr(image, "tile", None) or []
    if image.mode not in ("RGB", "RGBA") or not any(_layout(tile) in _LOW_BYTES for tile in tiles):
        return None
    stream: Any = image.fp  # type: ignore[attr-defined]
    place = stream.tell()
    stream.seek(0)
    content: bytes = stream.read()
    stream.seek(place)
    return content


def _layout(tile: Any) -> str:
    """Return the part of a tile's raw mode that names the layout of its values, such as `16B`."""
    arguments = tile[3]
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw.rpartition(";")[2] if isinstance(raw, str) else ""


def _low_bytes(content: bytes, mode: str) -> np.ndarray | None:
    """Return the low byte of each value, which Pillow drops; None if it cannot be read."""
    with Image.open(io.BytesIO(content)) as image:
        tiles = []
        for tile in image.tile:  # type: ignore[attr-defined]
            arguments = tile[3]
            raw: Any = arguments[0] if isinstance(arguments, tuple) else arguments
            other = raw.replace(_layout(tile), _LOW_BYTES[_layout(tile)])
            tiles.append(tile._replace(args=(other, *arguments[1:]) if isinstance(arguments, tuple) else other))
        image.tile = tiles  # type: ignore[attr-defined]
        try:
            return np.asarray(image) if image.mode == mode else None
        except (ValueError, OSError):  # no such unpacker, as for grey with alpha
            return None


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield an image's rows in blocks of limited size."""
    rows = max(1, _BLOCK // max(1, values[:1].size))
    return (values[start : start + rows] for start in range(0, len(values), rows))


def _range_of(values: np.ndarray, floats: bool) -> _Range:
    """Return the values that become black and white; see `to_rgb`."""
    ends = [(block[np.isfinite(block)] if floats else block.ravel()) for block in _blocks(values)]
    found = [(float(block.min()), float(block.max())) for block in ends if block.size]
    if not found:
        return _Range(0, 1)
    lowest, highest = min(low for low, _ in found), max(high for _, high in found)
    if floats:
        white = 1.0 if highest <= 1 else None
    else:
        white = next((2.0**bits - 1 for bits in _DEPTHS if highest < 2**bits), None)
    usual = lowest >= 0 and white is not None
    if white is not None and usual and (lowest == highest or highest - lowest >= white / _NARROW):
        return _Range(0, white)
    return _Range(lowest, highest)


def _scaled(values: np.ndarray, scale: _Range) -> np.ndarray:
    """Scale values to 8 bits; an empty range is black."""
    out = np.empty(values.shape, dtype=np.uint8)
    done = 0
    for block in _blocks(values):
        part = block.astype(np.float64)
        if scale.white > scale.black:
            part = (part - scale.black) * (255 / (scale.white - scale.black))
        else:
            part = np.where(np.isposinf(part), 255.0, 0.0)
        np.nan_to_num(part, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
        out[done : done + len(block)] = np.rint(part.clip(0, 255)).astype(np.uint8)
        done += len(block)
    return out
