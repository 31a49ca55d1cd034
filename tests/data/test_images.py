"""Images: which files are opened, their pixels, and which are refused."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
import zlib
from pathlib import Path

import pytest
from PIL import Image

from lora_llava.data.images.image_id import ImageId
from lora_llava.data.images.image_names import coco_names
from lora_llava.data.images.image_sources import BadImageError, FolderImages, JoinedImages, TableImages, read_rgb


def refused(folder: Path, name: str, message: str, max_pixels: int = 100) -> None:
    with pytest.raises(BadImageError, match=f"^{re.escape(message)}"):
        FolderImages(folder, max_pixels).open(name)


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    assert image.mode == "RGB"
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


def test_an_image_opens_in_rgb(image_folder: Path) -> None:
    assert pixels(FolderImages(image_folder, 16).open("green.png")) == [(0, 255, 0)] * 16


def test_names_that_stay_inside_the_folder_open(image_folder: Path) -> None:
    (image_folder / "sub").mkdir()
    (image_folder / "sub" / "link.png").symlink_to(image_folder / "blue.png")
    images = FolderImages(image_folder, 16)
    for name in ("sub/../blue.png", "sub/link.png", "./blue.png", str(image_folder / "blue.png")):
        assert pixels(images.open(name)) == [(0, 0, 255)] * 16


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "link.png", "folder/secret.png"])
def test_no_way_leads_out_of_the_folder(image_folder: Path, name: str) -> None:
    outside = image_folder.parent / "secret.png"
    Image.new("RGB", (1, 1)).save(outside)
    (image_folder / "link.png").symlink_to(outside)
    (image_folder / "folder").symlink_to(image_folder.parent, target_is_directory=True)
    refused(image_folder, name, f"image {name} is outside {image_folder}")
    refused(image_folder, str(outside), f"image {outside} is outside {image_folder}")


def test_a_neighbour_with_the_folder_s_name_as_its_start_is_outside(image_folder: Path) -> None:
    neighbour = image_folder.parent / "images2"
    neighbour.mkdir()
    Image.new("RGB", (1, 1)).save(neighbour / "a.png")
    refused(image_folder, "../images2/a.png", f"image ../images2/a.png is outside {image_folder}")


@pytest.mark.parametrize("name", ["http://host/a.png", "https://host/a.png", "file:///etc/passwd"])
def test_urls_are_refused(image_folder: Path, name: str) -> None:
    refused(image_folder, name, f"image {name} is a URL; only files under {image_folder} are opened")


def test_a_missing_image_is_named(image_folder: Path) -> None:
    refused(image_folder, "pink.png", "image pink.png is missing")
    refused(image_folder, "", "image  cannot be read: ")


def test_a_name_with_a_nul_is_refused(image_folder: Path) -> None:
    refused(image_folder, "a\0b.png", "image ")


def test_the_pixel_cap_is_exact(image_folder: Path) -> None:
    assert FolderImages(image_folder, 16).open("red.png").size == (4, 4)
    refused(image_folder, "red.png", "image red.png has 4 x 4 pixels, over max_image_pixels 15", max_pixels=15)


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels of it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as it is where a person runs it
def test_a_bomb_is_refused_by_its_header(image_folder: Path) -> None:
    (image_folder / "bomb.png").write_bytes(png(10_000, 10_000))
    refused(image_folder, "bomb.png", "image bomb.png has 10000 x 10000 pixels, over max_image_pixels 100")
    (image_folder / "bomb.png").write_bytes(png(60_000, 60_000))
    message = "image bomb.png has 3600000000 pixels, over Pillow's limit of 178956970; scale it down"
    refused(image_folder, "bomb.png", message, max_pixels=10**12)


def test_a_truncated_image_is_refused(image_folder: Path) -> None:
    noise = Image.frombytes("RGB", (8, 8), bytes(range(192)))
    noise.save(image_folder / "whole.png")
    content = (image_folder / "whole.png").read_bytes()
    assert pixels(FolderImages(image_folder, 64).open("whole.png")) == pixels(noise)
    for length in (0, 7, 30, len(content) // 2, len(content) - 40):
        (image_folder / "cut.png").write_bytes(content[:length])
        refused(image_folder, "cut.png", "image cut.png cannot be read: ")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_damaged_image_is_read_or_refused(kind: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(file, kind)
    content = file.getvalue()
    for place in range(len(content)):
        for value in (0, 11, 255):
            damaged = io.BytesIO(content[:place] + bytes([value]) + content[place + 1 :])
            with contextlib.suppress(BadImageError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert read_rgb(damaged, "a", 16).mode == "RGB"


def test_a_text_file_is_refused(image_folder: Path) -> None:
    (image_folder / "a.png").write_text("<html>404</html>")
    refused(image_folder, "a.png", "image a.png cannot be read: ")


def test_a_palette_with_transparency_keeps_its_colours(image_folder: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(image_folder / "palette.png", transparency=b"\x00\x80")
    with Image.open(image_folder / "palette.png") as saved:
        assert (saved.mode, saved.info["transparency"]) == ("P", b"\x00\x80")
    assert pixels(FolderImages(image_folder, 16, background="llava").open("palette.png")) == [(255, 0, 0), (0, 255, 0)]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (9, 8, 7, 0), (9, 8, 7)),
        ("LA", (7, 0), (7, 7, 7)),
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_other_modes_become_rgb(mode: str, colour: int | tuple[int, ...], expected: tuple[int, ...]) -> None:
    file = io.BytesIO()
    Image.new(mode, (1, 1), colour).save(file, "PNG")
    assert pixels(read_rgb(io.BytesIO(file.getvalue()), "a", 1, "llava")) == [expected]


COCO_NAMES = [
    f"{folder}{prefix}000000442786.jpg"
    for folder, prefix in [
        ("", ""),
        ("", "COCO_train2014_"),
        ("", "COCO_val2014_"),
        ("train2017/", ""),
        ("val2017/", ""),
        ("train2014/", "COCO_train2014_"),
        ("val2014/", "COCO_val2014_"),
        ("train2014/", ""),
        ("coco/train2017/", ""),
        ("coco/val2014/", "COCO_val2014_"),
        ("coco/", ""),
    ]
]


@pytest.mark.parametrize("kept", COCO_NAMES)
@pytest.mark.parametrize("named", COCO_NAMES)
def test_coco_s_releases_know_one_image_by_several_names(tmp_path: Path, kept: str, named: str) -> None:
    if kept.startswith("coco/") != named.startswith("coco/"):
        return  # the folder above the splits is the row's own
    (tmp_path / kept).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (1, 1), (7, 8, 9)).save(tmp_path / kept, "PNG")
    images = FolderImages(tmp_path, 1)
    assert images.find(named) == tmp_path / kept
    assert pixels(images.open(named)) == [(7, 8, 9)]
    refused(tmp_path, named.replace("442786", "442787"), f"image {named.replace('442786', '442787')} is missing")


def test_a_row_s_own_name_comes_first(tmp_path: Path) -> None:
    for name in ("000000442786.jpg", "COCO_train2014_000000442786.jpg"):
        (tmp_path / name).write_bytes(b"x")
        assert FolderImages(tmp_path, 1).find(name) == tmp_path / name
    assert coco_names("a/1.png") == coco_names("442786.jpg") == coco_names("000000442786.png") == []
    assert coco_names("xCOCO_train2014_000000442786.jpg") == []


def test_a_coco_name_leads_nowhere_else(image_folder: Path) -> None:
    Image.new("RGB", (1, 1)).save(image_folder.parent / "000000442786.jpg", "PNG")
    name = "../COCO_train2014_000000442786.jpg"
    refused(image_folder, name, f"image {name} is outside {image_folder}")


def test_a_coco_folder_that_leads_out_does_not_end_the_search(image_folder: Path) -> None:
    (image_folder / "train2017").symlink_to(image_folder.parent, target_is_directory=True)
    refused(image_folder, "000000442786.jpg", "image 000000442786.jpg ")
    (image_folder / "val2017").mkdir()
    Image.new("RGB", (1, 1), (7, 8, 9)).save(image_folder / "val2017" / "000000442786.jpg", "PNG")
    assert pixels(FolderImages(image_folder, 1).open("000000442786.jpg")) == [(7, 8, 9)]


def test_an_image_in_the_row_itself_is_refused(image_folder: Path) -> None:
    name = "data:image/png;base64," + "A" * 100
    refused(image_folder, name, f"image {name[:60]} is a URL; only files under {image_folder} are opened")


def test_a_file_is_read_undecoded(image_folder: Path) -> None:
    images = FolderImages(image_folder, 1)  # whatever its size
    assert images.read("red.png") == (image_folder / "red.png").read_bytes()
    with pytest.raises(BadImageError, match=r"^image pink.png is missing$"):
        images.read("pink.png")
    with pytest.raises(BadImageError, match=r"^image \. cannot be read: Is a directory$"):
        images.read(".")


def test_a_name_that_is_too_long_is_refused(image_folder: Path) -> None:
    refused(image_folder, "iVBORw0KGgo" * 40, "image ")


def test_a_link_to_itself_is_refused(image_folder: Path) -> None:
    (image_folder / "loop.png").symlink_to("loop.png")
    refused(image_folder, "loop.png", "image ")


def test_images_of_a_table_s_column(image_folder: Path) -> None:
    red, green, blue = ((image_folder / f"{name}.png").read_bytes() for name in ("red", "green", "blue"))
    table = [
        {"image": {"bytes": red, "path": None}, "images": [{"bytes": green}, {"bytes": blue}, {"bytes": None}]},
        {"image": None, "images": []},
    ]
    single, several = TableImages(table, 16), TableImages(table, 16, "images")
    assert single.read("0") == red
    assert [pixels(several.open(name))[0] for name in ("0:0", "0:1", "0")] == [(0, 255, 0), (0, 0, 255), (0, 255, 0)]
    for images, name in ((single, "1"), (several, "0:2")):
        with pytest.raises(BadImageError, match=f"^image of row {name} is missing$"):
            images.open(name)
    with pytest.raises(BadImageError, match=r"^image of row 0 has 4 x 4 pixels, over max_image_pixels 15$"):
        TableImages(table, 15).open("0")


def test_joined_images_are_opened_by_their_source(image_folder: Path) -> None:
    (image_folder / "1|a.png").write_bytes((image_folder / "green.png").read_bytes())
    table = TableImages([{"image": {"bytes": (image_folder / "blue.png").read_bytes()}}], 16)
    images = JoinedImages([FolderImages(image_folder, 16), table])
    assert pixels(images.open(ImageId(0, "red.png"))) == [(255, 0, 0)] * 16
    assert pixels(images.open(ImageId(0, "1|a.png"))) == [(0, 255, 0)] * 16
    assert pixels(images.open(ImageId(1, "0"))) == [(0, 0, 255)] * 16
    assert images.read(ImageId(1, "0")) == (image_folder / "blue.png").read_bytes()
    with pytest.raises(BadImageError, match=r"^image pink.png is missing$"):
        images.read(ImageId(0, "pink.png"))
