"""Names as people have them: matched to the one file that is meant, refused where several are, links named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from lora_llava.data.images.image_check import inspect_images
from lora_llava.data.images.image_id import ImageId
from lora_llava.data.images.image_names import MATCHED
from lora_llava.data.images.image_sources import BadImageError, FolderImages, JoinedImages, TableImages


def draw(folder: Path, *names: str) -> FolderImages:
    for number, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (number, 0, 0)).save(file, "PNG")
    return FolderImages(folder, 99)


@pytest.mark.parametrize(
    ("files", "name", "expected"),
    [
        (["01.png"], "01.png ", "01.png"),
        (["01.png"], " 01.png", "01.png"),
        (["01.png "], "01.png", "01.png "),
        (["01.png"], "01", "01.png"),
        (["01.png"], "01.PNG", "01.png"),
        (["01.png"], "images/01.png", "01.png"),
        (["01.png"], "images/01", "01.png"),
        (["01.png"], "../images/01.png", "01.png"),
        (["01.png"], "/home/me/images/01.png", "01.png"),
        (["01.png"], "C:\\imgs\\01.png", "01.png"),
        (["01.png"], "\\\\server\\share\\01.png ", "01.png"),
        (["sub/01.png"], "sub\\01.png", "sub/01.png"),
        (["sub/01.png"], "01.png", "sub/01.png"),
        (["sub/01.png"], "other/01.png", "sub/01.png"),
        (["train/01.png", "val/01.png"], "C:\\data\\val\\01.png", "val/01.png"),
        (["my image.png"], "my%20image.png", "my image.png"),
        (["r\u00f4t.png"], "ro\u0302t.png", "r\u00f4t.png"),
        (["v1.2.png"], "v1.2", "v1.2.png"),
    ],
)
def test_a_name_is_matched_to_the_one_file_that_is_meant(
    tmp_path: Path, files: list[str], name: str, expected: str
) -> None:
    images = draw(tmp_path, *files, "another.png")
    assert images.find(name) == tmp_path / expected
    assert (images.matched(name), images.label(name)) == (expected, expected)
    assert images.open(name).getpixel((0, 0)) == (files.index(expected), 0, 0)
    (found,) = inspect_images(images, [name])[name].oddities
    assert found == (MATCHED, f"image {name} does not exist under this name; the file {expected} is used")


def test_a_file_s_own_name_comes_first(tmp_path: Path) -> None:
    images = draw(tmp_path, "a.png", "sub/a.png", "a", "A.PNG")
    for name in ("a.png", "sub/a.png", "a", "A.PNG"):
        assert images.find(name) == tmp_path / name
        assert images.matched(name) is None


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (["01.jpg", "01.png"], "01"),
        (["a/01.png", "b/01.png"], "01.png"),
        (["a/01.png", "b/01.png"], "c\\01.png"),
        (["IMG.png", "img.PNG"], "Img.png"),
    ],
)
def test_a_name_that_several_files_match_is_refused(tmp_path: Path, files: list[str], name: str) -> None:
    images = draw(tmp_path, *files)
    reported = f"image {name} may be {files[0]} or {files[1]}; write the exact file name"
    with pytest.raises(BadImageError, match=f"^{re.escape(reported)}$"):
        images.open(name)
    assert inspect_images(images, [name])[name].problem == reported


def test_two_names_of_one_file_are_reported_if_their_folders_differ(tmp_path: Path) -> None:
    images = draw(tmp_path, "a/01.png", "02.png")
    found = inspect_images(images, ["a/01.png", "b/01.png", "02.png", "images\\02.png"])
    assert {name: image.problem for name, image in found.items()} == {
        "a/01.png": None,
        "02.png": None,
        "images\\02.png": None,
        "b/01.png": "image b/01.png may be a/01.png, but so may a/01.png; write the exact file names",
    }


def test_a_name_that_no_file_has_is_missing(tmp_path: Path) -> None:
    images = draw(tmp_path, "01.png")
    for name in ("1.png", "01.jpg", "a.01.png"):
        with pytest.raises(BadImageError, match=r" is missing$"):
            images.open(name)


def test_links_that_lead_out_are_refused_with_the_key(tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere", "sub/01.png")
    images = draw(tmp_path / "images", "02.png")
    (images.root / "coco").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (images.root / "03.png").symlink_to(tmp_path / "elsewhere" / "sub" / "01.png")
    for name, link in (("coco/sub/01.png", "coco"), ("03.png", "03.png"), ("C:\\03.PNG", "03.png")):
        with pytest.raises(BadImageError) as error:
            images.open(name)
        assert str(error.value).endswith(
            f" is outside {images.root}: {link} is a link that leads out of it; set data.follow_links=true to allow "
            "such links"
        )
        assert error.value.kind == "outside the folder"
    followed = FolderImages(images.root, 99, follow_links=True)
    for name in ("coco/sub/01.png", "03.png", "01.png", "images\\01"):
        assert followed.open(name).size == (9, 9)
    with pytest.raises(BadImageError, match=r" is outside "):
        followed.open("../elsewhere/sub/none.png")


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    images = draw(tmp_path / "images", "sub/01.png")
    (images.root / "sub" / "up").symlink_to(images.root, target_is_directory=True)
    assert FolderImages(images.root, 99, follow_links=True).find("01") == images.root / "sub" / "01.png"


def test_images_are_named_for_a_person(tmp_path: Path) -> None:
    images = draw(tmp_path, "01.png")
    table = TableImages([{"image": {"bytes": b"", "path": "cat.png"}}, {"image": b""}], 9)
    joined = JoinedImages([images, table])
    assert [
        joined.label(name)
        for name in (ImageId(0, "01.png"), ImageId(0, "01"), ImageId(0, "no.png"), ImageId(1, "0"), ImageId(1, "1"))
    ] == [
        "01.png",
        "01.png",
        "no.png",
        "cat.png of row 0",
        "of row 1",
    ]
