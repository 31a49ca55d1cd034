"""Hostile images and names: nothing is read outside the folder, fetched, started, waited for or unpacked."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.own_rows import asked
from tests.security.conftest import WriteRows
from tests.security.hostile import MEMORY_RISE_MIB, Outcome, counting_server, png, run_verb, tiff

PIXELS_81M = (9000, 9000)
NO_IMAGE = "cannot be read: it is not an image, or of an unknown format"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%touch /tmp/x) (w) file\n"
SVG = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script><image href="file:///etc/passwd"/></svg>'


def _cut_jpeg(file: Path) -> None:
    whole = io.BytesIO()
    Image.effect_noise((200, 200), 80).convert("RGB").save(whole, "JPEG")
    file.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])


def _sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.write(png(4, 4, 4))
        stream.truncate(4 << 30)


def _bomb(file: Path) -> None:
    file.write_bytes(png(*PIXELS_81M, rows=PIXELS_81M[1]))
    assert file.stat().st_size < 300_000


HOSTILE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "bomb.png": (_bomb, "has 9000 x 9000 pixels, over max_image_pixels 50000000", "oversized image"),
    "claim.png": (
        lambda file: file.write_bytes(png(60_000, 60_000)),
        "has 3600000000 pixels, over max_image_pixels 50000000; scale it down",
        "oversized image",
    ),
    "absurd.tif": (
        lambda file: file.write_bytes(tiff(2**31 - 1, 2**31 - 1)),
        "has 4611686014132420609 pixels, over max_image_pixels 50000000; scale it down",
        "oversized image",
    ),
    "sparse.png": (
        _sparse,
        "is a file of 4,294,967,296 bytes, too large for max_image_pixels 50000000",
        "oversized image",
    ),
    "cut.jpg": (_cut_jpeg, "cannot be read: image file is truncated", "corrupt image"),
    "script.svg": (lambda file: file.write_text(SVG), NO_IMAGE, "corrupt image"),
    "page.png": (lambda file: file.write_text("<html><script>alert(1)</script>"), NO_IMAGE, "corrupt image"),
    "print.png": (
        lambda file: file.write_bytes(EPS),
        "is EPS, which is not supported; save it as PNG or JPEG",
        "corrupt image",
    ),
    "pipe.png": (lambda file: os.mkfifo(file), "is a pipe, socket or device, not a file", "corrupt image"),
    "folder.png": (lambda file: file.mkdir(), "cannot be read: Is a directory", "corrupt image"),
    "loop.png": (lambda file: file.symlink_to(file.name), "cannot be a file: ", "missing image"),
}


@pytest.fixture
def good(write_rows: WriteRows) -> Outcome:
    found = run_verb("finetune", write_rows(), "--dry-run")
    assert found.code == 0, found.err
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_image_is_one_line(name: str, write_rows: WriteRows, images: Path, good: Outcome) -> None:
    make, reported, _ = HOSTILE[name]
    make(images / name)
    found = run_verb("finetune", write_rows([asked(8, name)], validation_rows=0), "--dry-run")
    assert found.code == 2, found.err
    assert len(found.err.splitlines()) == 1
    shown = repr(name) if name == "loop.png" else name
    assert found.err.startswith(f"error: row r8 (rows.json, index 8): image {shown} {reported}")
    assert found.err.endswith("; fix it or set data.on_bad_image=drop\n")
    assert found.rise_mib - good.rise_mib < MEMORY_RISE_MIB


def test_hostile_images_are_dropped_and_counted(write_rows: WriteRows, images: Path, tmp_path: Path) -> None:
    for name, (make, _, _) in HOSTILE.items():
        make(images / name)
    rows = [asked(8 + number, name) for number, name in enumerate(HOSTILE)]
    found = run_verb("finetune", write_rows(rows, validation_rows=0, on_bad_image="drop"), "--dry-run")
    assert found.code == 0, found.err
    assert f"{len(HOSTILE)} bad image" in found.out
    report = tmp_path / "report.json"
    assert run_verb("check", write_rows(rows, validation_rows=0), "--json", report).code == 1
    errors = [(each["row"], each["kind"]) for each in json.loads(report.read_text())["errors"]]
    assert sorted(errors) == sorted((row["id"], HOSTILE[row["image"]][2]) for row in rows)


def test_no_program_is_started_for_an_image(write_rows: WriteRows, images: Path, tmp_path: Path) -> None:
    marker, programs = tmp_path / "started", tmp_path / "bin"
    programs.mkdir()
    for name in ("gs", "gswin64c", "djpeg", "xv"):
        (programs / name).write_text(f"#!/bin/sh\ntouch '{marker}'\n")
        (programs / name).chmod(0o755)
    (images / "print.png").write_bytes(EPS)
    path = f"{programs}:{os.environ['PATH']}"
    found = run_verb("check", write_rows([asked(8, "print.png")]), environment={"PATH": path})
    assert found.code == 1
    assert not marker.exists()


@pytest.mark.parametrize("tail", ["html", "zip"])
def test_data_appended_to_an_image_is_ignored(tail: str, write_rows: WriteRows, images: Path, tmp_path: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("../../escaped.txt", "x" * 1000)
    more = archive.getvalue() if tail == "zip" else b"<html><script>alert('appended')</script></html>"
    file = images / "both.png"
    Image.new("RGB", (40, 40), (1, 2, 3)).save(file)
    file.write_bytes(file.read_bytes() + more)
    recipe, page = write_rows([asked(8, "both.png")], validation_rows=0), tmp_path / "page.html"
    assert run_verb("preview", recipe, "--output", page).code == 0
    assert b"alert('appended')" not in page.read_bytes()
    assert not list(tmp_path.rglob("escaped.txt"))


def test_a_gif_of_10_000_frames_is_its_first(
    write_rows: WriteRows, images: Path, good: Outcome, tmp_path: Path
) -> None:
    frames = (Image.new("P", (16, 16), number % 256) for number in range(10_000))
    first = next(frames)
    first.save(images / "long.gif", save_all=True, append_images=frames, optimize=False)
    report = tmp_path / "report.json"
    found = run_verb("check", write_rows([asked(8, "long.gif")], validation_rows=0), "--json", report)
    assert found.code == 0, found.err
    reported = "image long.gif has 10000 frames; only the first is used"
    warnings = json.loads(report.read_text())["warnings"]
    assert [each["message"] for each in warnings if each["kind"] == "several frames"] == [reported]
    assert found.rise_mib - good.rise_mib < MEMORY_RISE_MIB


LINK = "is a link that leads out of it; set data.follow_links=true to allow such links"
OUTSIDE = {
    "../secret.png": "is outside {images}",
    "0/../../secret.png": "is outside {images}",
    "{root}/secret.png": "is outside {images}",
    "link.png": f"is outside {{images}}: link.png {LINK}",
    "linked/secret.png": f"is outside {{images}}: linked {LINK}",
    "/etc/passwd": "is outside {images}",
    "/dev/zero": "is outside {images}",
    "file://{root}/secret.png": "is a URL; only files under {images} are opened",
    "{url}/a.png": "is a URL; only files under {images} are opened",
    "data:image/png;base64,iVBORw0KGgo=": "is a URL; only files under {images} are opened",
    "HTTP://127.0.0.1/a.png": "is a URL; only files under {images} are opened",
    "DATA:image/png;base64,iVBORw0KGgo=": "is a URL; only files under {images} are opened",
    "file:/etc/passwd": "is missing",
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_the_folder_is_read_or_fetched(
    name: str, write_rows: WriteRows, images: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "linked").symlink_to(tmp_path, target_is_directory=True)
    before = _last_read(tmp_path / "secret.png")
    with counting_server() as (url, asked_for):
        own = name.format(root=tmp_path, url=url)
        found = run_verb("finetune", write_rows([asked(8, own)], validation_rows=0), "--dry-run")
    reported = (
        f"error: row r8 (rows.json, index 8): image {own[:60] if 'URL' in OUTSIDE[name] else own} {OUTSIDE[name]}"
    )
    assert (found.code, found.err) == (2, f"{reported.format(images=images)}; fix it or set data.on_bad_image=drop\n")
    assert asked_for == []
    assert _last_read(tmp_path / "secret.png") == before


def _last_read(file: Path) -> int:
    """A time long past is set, so that even `relatime` notes a read."""
    if file.stat().st_atime_ns > 10**18:
        os.utime(file, ns=(1, 2))
    return file.stat().st_atime_ns


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_rows_of_every_kind_fetch_nothing(suffix: str, write_rows: WriteRows, tmp_path: Path) -> None:
    file = tmp_path / f"table.{suffix}"
    with counting_server() as (url, asked_for):
        row = {"id": "u", "image": f"{url}/a.png", "question": f"What is {url}/q.png?", "answer": f"<img src={url}/b>"}
        if suffix == "csv":
            file.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
        else:
            file.write_text(json.dumps([row]) if suffix == "json" else json.dumps(row) + "\n")
        recipe = write_rows(file=file, validation_rows=0)
        codes = [run_verb(*verb).code for verb in (["check", recipe], ["finetune", recipe, "--dry-run"])]
        page = tmp_path / "page.html"
        codes.append(run_verb("preview", recipe, "--output", page).code)
    assert (codes, asked_for) == ([1, 2, 2], [])
