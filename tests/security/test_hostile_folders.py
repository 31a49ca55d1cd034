"""Folders made to harm: `init` reads nothing outside them, expands nothing, and writes only into `recipe_rows`."""

from __future__ import annotations

import itertools
import json
import os
import zipfile
from pathlib import Path

import pytest
from data.folders_exported import web_dataset
from data.folders_made import draw, png, save, tar
from security.hostile import HOSTILE_TEXTS, MEMORY_RISE_MIB, run_verb

_XML = '<?xml version="1.0"?><!DOCTYPE annotations [{}]><annotations><image name="a.png"><tag label="{}"/></image>{}'


def bomb() -> str:
    """Entities that expand to ten billion letters."""
    names = "abcdefghij"
    entities = '<!ENTITY a "lol">' + "".join(
        f'<!ENTITY {name} "{f"&{before};" * 10}">' for before, name in itertools.pairwise(names)
    )
    return _XML.format(entities, "&j;", "</annotations>")


@pytest.mark.parametrize(
    "text",
    [bomb(), _XML.format('<!ENTITY x SYSTEM "file:///etc/hostname">', "&x;", "</annotations>")],
    ids=["bomb", "file"],
)
def test_entities_are_not_expanded(text: str, tmp_path: Path) -> None:
    draw(tmp_path / "mine", "a.png")
    save(tmp_path / "mine" / "annotations.xml", text)
    found = run_verb("init", tmp_path / "mine", "--model", "demo")
    assert (found.code, found.err.strip()) == (
        2,
        f"error: {tmp_path}/mine/annotations.xml: it has a document type (DOCTYPE), which labels do not need; remove "
        "that line",
    )
    assert found.rise_mib < MEMORY_RISE_MIB


def test_archives_write_only_below_the_folder_of_unpacked_images(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = tmp_path / "mine"
    web_dataset(folder, dirty=True)
    members: dict[str, bytes | str] = {"0.png": png("0"), "0.txt": "A zero.", "/abs.png": png("1"), "/abs.txt": "x"}
    members |= {f"../outside/{n}.png": png("2") for n in range(2)} | {"link": f"-> {outside}", "link/x.png": png("3")}
    members |= {"link/x.txt": "x", "a\\..\\..\\b.png": png("4"), "C:/x.png": png("5"), "C:/x.txt": "x"}
    tar(folder / "train-000001.tar", members)
    before = {path for path in tmp_path.rglob("*") if folder not in path.parents}
    assert run_verb("init", folder, "--model", "demo").code == 0
    assert {path for path in tmp_path.rglob("*") if folder not in path.parents} == before
    unpacked = folder / "recipe_rows" / "images"
    images = {path for path in tmp_path.rglob("*.png") if path.is_file()}
    assert all(path.is_relative_to(unpacked) for path in images)
    assert not any(path.is_symlink() for path in unpacked.rglob("*"))


def test_labels_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    draw(tmp_path, "secret.png")
    folder = tmp_path / "mine"
    draw(folder, "a.png", "b.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["a.png", "b.png", "../secret.png", str(tmp_path / "secret.png"), "file:///etc/passwd", "link.png", "x\0y"]
    images = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    captions = [{"id": n, "image_id": n, "caption": f"Caption {n}."} for n in range(len(names))]
    save(folder / "captions.json", {"images": images, "annotations": captions})
    found = run_verb("init", folder, "--model", "demo")
    assert (found.code, found.err) == (0, "")
    rows = [json.loads(line) for line in (folder / "recipe_rows" / "train.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == ["a.png", "b.png"]


def test_a_workbook_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("python_calamine")
    with zipfile.ZipFile(tmp_path / "rows.xlsx", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("xl/worksheets/sheet1.xml", bytes(1 << 20))
        packed.infolist()[0].file_size = 1_153_433_600  # what the directory of the archive says
    found = run_verb("init", tmp_path, "--model", "demo")
    assert found.code == 2
    assert "its sheets have 1,153,433,600 bytes unpacked; save the sheet of rows as CSV" in found.err
    assert found.rise_mib < MEMORY_RISE_MIB


def test_deep_json_and_pipes_end(tmp_path: Path) -> None:
    draw(tmp_path, "a.png")
    save(tmp_path / "deep.json", '{"images":' + "[" * 1_000_000)
    found = run_verb("init", tmp_path, "--model", "demo")
    assert (found.code, "nested too deeply" in found.err) == (2, True)
    (tmp_path / "deep.json").unlink()
    for name in ("pipe.json", "pipe.xml", "pipe.csv", "pipe.tar"):
        os.mkfifo(tmp_path / name)
    assert run_verb("init", tmp_path, "--model", "demo", limit=30).code == 2


@pytest.mark.parametrize("text", [*HOSTILE_TEXTS, "\x1b[31mred\x1b[0m", "\u202ereversed"])
def test_names_from_files_are_printed_as_text(text: str, tmp_path: Path) -> None:
    draw(tmp_path, "a.png", "b.png")
    images = [{"id": n, "file_name": name} for n, name in enumerate(["a.png", "b.png", text])]
    boxes = [{"id": n, "image_id": n, "category_id": n % 2, "bbox": [0, 0, 1, 1]} for n in range(3)]
    categories = [{"id": 0, "name": text}, {"id": 1, "name": "[bold]b"}]
    save(tmp_path / "a.json", {"images": images, "annotations": boxes, "categories": categories})
    found = run_verb("init", tmp_path, "--model", "demo")
    assert (found.code, found.err) == (0, "")
    assert "\x1b" not in found.out
    assert "\u202e" not in found.out
    assert "[bold]b" in found.out
