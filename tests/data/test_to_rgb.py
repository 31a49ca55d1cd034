"""Images of every mode as RGB: deep values scaled, transparency composited, and both reported."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_llava.data.images.image_check import inspect_image, inspect_images
from lora_llava.data.images.image_sources import FolderImages, TableImages, read_converted
from lora_llava.data.images.to_rgb import SCALED, TRANSPARENT, Background, Converted

TWELVE = np.array([[0, 1000, 4095]], dtype=np.uint16)


def converted(image: Image.Image, kind: str = "PNG", background: Background = "white", **options: Any) -> Converted:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return read_converted(file, "a", 100, background)


def grey(found: Converted) -> list[int]:
    values = np.asarray(found.image)
    assert found.image.mode == "RGB"
    assert (values == values[..., :1]).all()
    return [int(value) for value in values[..., 0].ravel()]


def colours(found: Converted) -> list[list[int]]:
    return [[int(value) for value in pixel] for pixel in np.asarray(found.image).reshape(-1, 3)]


def deep_png(values: np.ndarray, colour_type: int, clear: tuple[int, ...] = ()) -> io.BytesIO:
    """A PNG of 16 bits a channel, which Pillow does not write; colour types of PNG: 2 RGB, 4 LA, 6 RGBA."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = values.shape[:2]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    header += chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) if clear else b""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (TWELVE, "PNG", [0, 62, 255]),
        (TWELVE, "TIFF", [0, 62, 255]),
        (TWELVE.astype(">u2"), "TIFF", [0, 62, 255]),
        (TWELVE.astype(np.int32), "TIFF", [0, 62, 255]),
        (TWELVE * 16, "PNG", [0, 62, 255]),
        (np.array([[0, 7 * 257, 65535]], dtype=np.uint16), "PNG", [0, 7, 255]),  # a copy of an image of 8 bits
        (np.array([[0, 7, 255]], dtype=np.uint16), "PNG", [0, 7, 255]),
        (np.array([[512, 1023]], dtype=np.uint16), "PNG", [128, 255]),
        (np.array([[30000, 30100]], dtype=np.uint16), "PNG", [0, 255]),  # narrow: its own range
        (np.array([[4095, 4095]], dtype=np.uint16), "PNG", [255, 255]),
        (np.array([[-5, 0, 5]], dtype=np.int32), "TIFF", [0, 128, 255]),
        (np.array([[0, 1 << 20]], dtype=np.int32), "TIFF", [0, 255]),
        (np.array([[0, 0.5, 1]], dtype=np.float32), "TIFF", [0, 128, 255]),
        (np.array([[-1000, 0, 1000]], dtype=np.float32), "TIFF", [0, 128, 255]),
        (np.array([[np.nan, -np.inf, 3, 7, np.inf]], dtype=np.float32), "TIFF", [0, 0, 0, 255, 255]),
        (np.array([[np.nan, np.inf]], dtype=np.float32), "TIFF", [0, 255]),
        (np.array([[-3e38, 3e38]], dtype=np.float32), "TIFF", [0, 255]),
    ],
)
def test_deep_grey_images_are_scaled(values: np.ndarray, kind: str, expected: list[int]) -> None:
    assert grey(converted(Image.fromarray(values), kind)) == expected


def test_large_images_are_converted_in_blocks() -> None:
    values = np.arange(1500 * 1500, dtype=np.int32).reshape(1500, 1500)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    found = grey(read_converted(file, "a", 1500 * 1500))
    assert found == np.rint(values.ravel() * (255 / (values.size - 1))).astype(int).tolist()


def test_scaling_is_noted() -> None:
    reported = "has mode I;16; it is scaled so that 0 is black and 4095 is white"
    assert converted(Image.fromarray(TWELVE)).notes == ((SCALED, reported),)
    assert converted(Image.new("L", (1, 1))).notes == ()
    assert converted(Image.fromarray(np.array([[0, 255]], dtype=np.uint16))).notes == ()


def test_deep_colour_images_are_scaled_by_the_bits_they_use() -> None:
    values = np.array([[[0, 100, 4095], [4095, 4095, 2000]]], dtype=np.uint16)
    expected = [[0, 6, 255], [255, 255, 125]]
    shallow, full = (read_converted(deep_png(each, 2), "a", 9) for each in (values, values * 16))
    assert (colours(shallow), colours(full)) == (expected, expected)
    assert ([kind for kind, _ in shallow.notes], full.notes) == ([SCALED], ())
    opaque = np.dstack([values, np.full((1, 2), 4095, dtype=np.uint16)])
    assert colours(read_converted(deep_png(opaque, 6), "a", 9)) == expected
    hidden = np.array([[[10, 4095], [4000, 0]]], dtype=np.uint16)
    assert grey(read_converted(deep_png(hidden, 4), "a", 9))[1] == 255
    assert colours(read_converted(deep_png(values, 2, (0, 100, 4095)), "a", 9)) == [[255] * 3, expected[1]]
    assert colours(read_converted(deep_png(values * 16, 2, (0, 1600, 65520)), "a", 9)) == [[255] * 3, expected[1]]


CLEAR: dict[str, tuple[Image.Image, str, dict[str, Any], list[int]]] = {
    "RGBA": (Image.new("RGBA", (1, 1), (9, 8, 7, 0)), "PNG", {}, [9, 8, 7]),
    "RGBA in WebP": (Image.new("RGBA", (1, 1), (9, 8, 7, 0)), "WEBP", {"lossless": True, "exact": True}, [9, 8, 7]),
    "LA": (Image.new("LA", (1, 1), (7, 0)), "PNG", {}, [7, 7, 7]),
    "P": (Image.new("P", (1, 1), 0), "GIF", {"transparency": 0}, [0, 0, 0]),
    "P with alpha": (Image.new("P", (1, 1), 0), "PNG", {"transparency": b"\0"}, [0, 0, 0]),
    "RGB with a clear colour": (Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", {"transparency": (1, 2, 3)}, [1, 2, 3]),
    "L with a clear value": (Image.new("L", (1, 1), 5), "PNG", {"transparency": 5}, [5, 5, 5]),
    "1 with a clear value": (Image.new("1", (1, 1), 0), "PNG", {"transparency": 0}, [0, 0, 0]),
}


@pytest.mark.parametrize("name", CLEAR)
def test_transparency_is_composited(name: str) -> None:
    image, kind, options, own = CLEAR[name]
    found = {background: converted(image, kind, background, **options) for background in ("white", "black", "llava")}  # type: ignore[arg-type]
    assert {background: colours(each) for background, each in found.items()} == {
        "white": [[255, 255, 255]],
        "black": [[0, 0, 0]],
        "llava": [own],
    }
    assert found["white"].notes == (
        (TRANSPARENT, "has transparent parts; it is composited on white (data.background)"),
    )


def test_half_transparent_parts_are_mixed_and_opaque_images_stay() -> None:
    half = Image.new("RGBA", (1, 1), (200, 100, 0, 128))
    assert colours(converted(half)) == [[227, 177, 127]]
    opaque = converted(Image.new("RGBA", (1, 1), (9, 8, 7, 255)))
    assert (colours(opaque), opaque.notes) == ([[9, 8, 7]], ())


def test_every_source_of_images_composites_alike(tmp_path: Path) -> None:
    Image.new("RGBA", (9, 9), (9, 8, 7, 0)).save(tmp_path / "a.png")
    table = [{"image": {"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}}]
    for background, expected in (("white", 255), ("black", 0)):
        folder = FolderImages(tmp_path, 99, background=background)  # type: ignore[arg-type]
        embedded = TableImages(table, 99, background=background)  # type: ignore[arg-type]
        for images, name in ((folder, "a.png"), (embedded, "0")):
            assert images.open(name).getpixel((0, 0)) == (expected,) * 3  # type: ignore[attr-defined]
            kinds = [kind for kind, _ in inspect_image(images, name).oddities]  # type: ignore[arg-type]
            assert kinds == [TRANSPARENT]


def test_what_is_known_of_an_image_depends_on_the_background(tmp_path: Path) -> None:
    Image.new("RGBA", (9, 9)).save(tmp_path / "a.png")
    cache = tmp_path / "cache.json"
    for background in ("white", "black"):
        images = FolderImages(tmp_path, 99, background=background)  # type: ignore[arg-type]
        ((_, reported),) = inspect_images(images, ["a.png"], cache)["a.png"].oddities
        assert f"composited on {background}" in reported
