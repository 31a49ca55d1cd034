"""The check of images before training: problems, oddities, and the cache of what is known."""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_llava.data.images.image_check import ImageFacts, inspect_image, inspect_images
from lora_llava.data.images.image_sources import FolderImages

UPRIGHT, TURNED = 1, 6


def drawn(mode: str = "RGB", size: tuple[int, int] = (9, 8)) -> Image.Image:
    width, height = size
    return Image.frombytes("L", size, bytes(37 * n % 251 for n in range(width * height))).convert(mode)


def save(folder: Path, name: str, kind: str, image: Image.Image | None = None, **settings: Any) -> str:
    """Save an image; its file's SHA-256."""
    (image or drawn()).save(folder / name, kind, **settings)
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.png", "PNG"),
        ("a.PNG", "PNG"),
        ("a.jpg", "JPEG"),
        ("a.JPEG", "JPEG"),
        ("a.webp", "WEBP"),
        ("a.bmp", "BMP"),
        ("a.tif", "TIFF"),
        ("sub.png/a", "PNG"),
        ("a.image", "JPEG"),
    ],
)
def test_nothing_is_odd_about_a_clean_image(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    digest = save(tmp_path, name, kind)
    assert inspect_image(FolderImages(tmp_path, 72), name) == ImageFacts(None, "", (), digest)


def test_an_upright_orientation_is_not_odd(tmp_path: Path) -> None:
    for orientation in (0, UPRIGHT):
        digest = save(tmp_path, "a.jpg", "JPEG", exif=turned(orientation))
        assert inspect_image(FolderImages(tmp_path, 72), "a.jpg") == ImageFacts(None, "", (), digest)


MODE = ("image not RGB", "image {} has mode {}; it is converted, check it in the preview")
FRAMES = ("several frames", "image {} has 3 frames; only the first is used")
LYING = ("turned image", "image {} is rotated by an EXIF tag, which is ignored; the model sees it unrotated")
MISLEADING = ("mislabelled image", "image {} is a {}; it is read as such, but its suffix is wrong")
MANY: dict[str, Any] = {"save_all": True, "append_images": [drawn().rotate(180), drawn("1").convert("RGB")]}


@pytest.mark.parametrize(
    ("name", "kind", "image", "settings", "odd"),
    [
        ("a.jpg", "PNG", drawn(), {}, [(MISLEADING, "PNG")]),
        ("a.PNG", "JPEG", drawn(), {}, [(MISLEADING, "JPEG")]),
        ("a.webp", "BMP", drawn(), {}, [(MISLEADING, "BMP")]),
        ("a.gif", "WEBP", drawn(), {}, [(MISLEADING, "WEBP")]),
        ("a.png", "TIFF", drawn(), {}, [(MISLEADING, "TIFF")]),
        ("a.png", "PPM", drawn(), {}, [(MISLEADING, "PPM")]),
        ("a.png", "PNG", drawn("L"), {}, [(MODE, "L")]),
        ("a.png", "PNG", drawn("RGBA"), {}, [(MODE, "RGBA")]),
        ("a.png", "PNG", drawn("P"), {}, [(MODE, "P")]),
        ("a.png", "PNG", drawn("I;16"), {}, [(MODE, "I;16")]),
        ("a.jpg", "JPEG", drawn("CMYK"), {}, [(MODE, "CMYK")]),
        ("a.webp", "WEBP", drawn(), MANY, [(FRAMES,)]),
        ("a.tif", "TIFF", drawn(), MANY, [(FRAMES,)]),
        ("a.gif", "GIF", drawn(), MANY, [(MODE, "P"), (FRAMES,)]),
        ("a.jpg", "JPEG", drawn(), {"exif": turned(TURNED)}, [(LYING,)]),
        ("a.png", "PNG", drawn(), {"exif": turned(3)}, [(LYING,)]),
        ("a.png", "PNG", drawn(size=(7, 9)), {}, [(("tiny image", "image {} has 7 x 9 pixels"),)]),
        ("a.png", "PNG", drawn(size=(9, 7)), {}, [(("tiny image", "image {} has 9 x 7 pixels"),)]),
        (
            "a.jpg",
            "PNG",
            drawn("LA", (1, 1)),
            {"exif": turned(TURNED)},
            [(MISLEADING, "PNG"), (MODE, "LA"), (LYING,), (("tiny image", "image {} has 1 x 1 pixels"),)],
        ),
    ],
)
def test_oddities_of_an_image(
    tmp_path: Path, name: str, kind: str, image: Image.Image, settings: dict[str, Any], odd: list[Any]
) -> None:
    digest = save(tmp_path, name, kind, image, **settings)
    oddities = tuple((label, text.format(name, *more)) for (label, text), *more in odd)
    assert inspect_image(FolderImages(tmp_path, 72), name) == ImageFacts(None, "", oddities, digest)


def test_a_camera_s_jpeg_with_a_thumbnail_is_not_mislabelled(tmp_path: Path) -> None:
    save(tmp_path, "a.jpg", "MPO", save_all=True, append_images=[drawn()])
    found = inspect_image(FolderImages(tmp_path, 72), "a.jpg")
    assert [kind for kind, _ in found.oddities] == ["several frames"]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("gone.png", "missing image", "image gone.png is missing"),
        ("sub", "corrupt image", "image sub cannot be read: Is a directory"),
        (
            "http://host/a.png",
            "outside the folder",
            "image http://host/a.png is a URL; only files under {root} are opened",
        ),
        (
            "data:image/png;base64,AAAA",
            "outside the folder",
            "image data:image/png;base64,AAAA is a URL; only files under {root} are opened",
        ),
        ("../a.png", "outside the folder", "image ../a.png is outside {root}"),
        ("a\0b.png", "missing image", "image 'a\\x00b.png' cannot be a file: embedded null byte"),
    ],
)
def test_what_has_no_file_cannot_be_used(image_folder: Path, name: str, kind: str, message: str) -> None:
    (image_folder / "sub").mkdir()
    found = inspect_image(FolderImages(image_folder, 16), name)
    assert found == ImageFacts(message.format(root=image_folder), kind)


def test_incomplete_images_cannot_be_used(tmp_path: Path) -> None:
    save(tmp_path, "whole.png", "PNG", drawn(size=(40, 40)))
    content = (tmp_path / "whole.png").read_bytes()
    for damaged in (b"", b"<html>404</html>", content[:30], content[: len(content) // 2]):
        (tmp_path / "a.png").write_bytes(damaged)
        found = inspect_image(FolderImages(tmp_path, 1600), "a.png")
        assert (found.kind, found.oddities) == ("corrupt image", ())
        assert found.digest == hashlib.sha256(damaged).hexdigest()
        assert (found.problem or "").startswith("image a.png cannot be read: ")


def test_an_oversized_image_cannot_be_used(tmp_path: Path) -> None:
    digest = save(tmp_path, "a.png", "PNG")
    message = "image a.png has 9 x 8 pixels, over max_image_pixels 71"
    assert inspect_image(FolderImages(tmp_path, 71), "a.png") == ImageFacts(message, "oversized image", (), digest)


def gif_with_half_a_second_frame() -> bytes:
    file = io.BytesIO()
    drawn().save(file, "GIF", save_all=True, append_images=[drawn().rotate(180)])
    return file.getvalue()[: file.getvalue().rindex(b"\x21\xf9\x04") + 3]


def tiff_with_a_broken_second_frame() -> bytes:
    file = io.BytesIO()
    drawn().save(file, "TIFF", save_all=True, append_images=[drawn()])
    content = bytearray(file.getvalue())
    first = int.from_bytes(content[4:8], "little")
    entries = int.from_bytes(content[first : first + 2], "little")
    second = int.from_bytes(content[first + 2 + 12 * entries :][:4], "little")
    content[second : second + 2] = b"\0\0"  # no tag, so no size
    return bytes(content)


def webp_with_a_broken_exif() -> bytes:
    file = io.BytesIO()
    drawn().save(file, "WEBP", exif=turned(TURNED))
    return file.getvalue().replace(b"MM\0*", b"MM\0?")


@pytest.mark.parametrize(
    "content", [gif_with_half_a_second_frame(), tiff_with_a_broken_second_frame(), webp_with_a_broken_exif()]
)
def test_damage_behind_the_first_frame_raises_no_traceback(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    assert inspect_image(FolderImages(tmp_path, 576), "a").digest == hashlib.sha256(content).hexdigest()


def test_a_link_to_itself_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("a.png")
    assert inspect_image(FolderImages(tmp_path, 72), "a.png").problem is not None


class Counted(FolderImages):
    """A folder that keeps which images were opened."""

    def __init__(self, root: Path, max_pixels: int = 72) -> None:
        super().__init__(root, max_pixels)
        self.opened: list[str] = []

    def read(self, name: str) -> bytes:
        self.opened.append(name)
        return super().read(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(200):
        save(tmp_path / "images", f"{number}.png", "PNG", drawn(size=(9, 1 + number % 8)))
    return tmp_path / "images"


NAMES = [f"{number}.png" for number in range(200)]


def test_every_image_is_opened_once_and_found_in_order(folder: Path) -> None:
    images = Counted(folder)
    done: list[ImageFacts] = []

    def progress(found: Iterable[ImageFacts]) -> Iterable[ImageFacts]:
        for each in found:
            done.append(each)
            yield each

    found = inspect_images(images, NAMES, progress=progress)
    assert list(found) == NAMES
    assert list(found.values()) == done == [inspect_image(images, name) for name in NAMES]
    assert sorted(images.opened[:200]) == sorted(NAMES)
    assert inspect_images(images, []) == {}


def test_unchanged_images_are_not_opened_again(folder: Path) -> None:
    cache, images = folder.parent / "new" / "images.json", Counted(folder)
    names = [*NAMES[:5], "gone.png", "../out.png"]
    first = inspect_images(images, names, cache)
    images.opened.clear()
    assert inspect_images(images, names, cache) == first
    assert sorted(images.opened) == ["../out.png", "gone.png"]  # no file, so nothing to know it by
    images.opened.clear()
    assert inspect_images(images, ["3.png", "7.png"], cache)["3.png"] == first["3.png"]
    assert images.opened == ["7.png"]
    images.opened.clear()
    inspect_images(images, NAMES[:8], cache)  # what was known before is still known
    assert sorted(images.opened) == ["5.png", "6.png"]
    assert list(cache.parent.iterdir()) == [cache]


def test_changed_images_are_opened_again(folder: Path) -> None:
    cache, images = folder.parent / "images.json", Counted(folder)
    inspect_images(images, NAMES[:4], cache)
    (folder / "0.png").write_text("no image")
    old = (folder / "1.png").stat()
    os.utime(folder / "1.png", ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    (folder / "2.png").unlink()
    images.opened.clear()
    found = inspect_images(images, NAMES[:4], cache)
    assert sorted(images.opened) == ["0.png", "1.png", "2.png"]
    assert [found[name].kind for name in NAMES[:4]] == ["corrupt image", "", "missing image", ""]
    other = Counted(folder, max_pixels=1)
    assert inspect_images(other, ["3.png"], cache)["3.png"].kind == "oversized image"
    (folder.parent / "more").mkdir()
    save(folder.parent / "more", "3.png", "PNG", drawn("L"))
    more = inspect_images(Counted(folder.parent / "more"), ["3.png"], cache)
    assert [kind for kind, _ in more["3.png"].oddities] == ["image not RGB"]


BROKEN = ["", "{", '{"0.png": 5}', '{"0.png": ["x", 5]}', '{"0.png": ["x", {"other": 1}]}', "\xff"]


@pytest.mark.parametrize("content", [*BROKEN, "[]"])
def test_a_broken_cache_is_made_anew(folder: Path, content: str) -> None:
    cache, images = folder.parent / "images.json", Counted(folder)
    cache.write_bytes(content.encode("latin-1"))
    first = inspect_images(images, ["0.png"], cache)
    assert first == inspect_images(images, ["0.png"], cache) == inspect_images(images, ["0.png"])
    assert images.opened == ["0.png", "0.png"]
    assert list(json.loads(cache.read_text())) == ["0.png"]


def test_the_order_is_that_of_the_names_whatever_is_known(folder: Path) -> None:
    cache, images = folder.parent / "images.json", Counted(folder)
    inspect_images(images, ["2.png", "gone.png"], cache)
    assert list(inspect_images(images, ["gone.png", "3.png", "2.png"], cache)) == ["gone.png", "3.png", "2.png"]


def test_warnings_are_as_they_were(folder: Path) -> None:
    before = list(warnings.filters)
    try:
        for _ in range(20):
            inspect_images(Counted(folder), NAMES)
            assert list(warnings.filters) == before
    finally:
        warnings.filters[:] = before  # type: ignore[index]
