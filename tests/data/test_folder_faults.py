"""Folders whose faults would teach something wrong, or end without a word: each is refused or counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.data.folder import understand_folder
from lora_llava.data.folder_data import FolderData


def paint(*files: Path) -> None:
    for place, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (place * 20, 90, 40)).save(file)


def rows_of(found: FolderData) -> list[dict[str, Any]]:
    assert found.converted is not None
    return [row for rows in found.converted.splits.values() for row in rows]


def left_out(found: FolderData) -> str:
    assert found.converted is not None
    return "; ".join(found.converted.left_out.lines())


def test_a_gap_in_the_split_column_is_refused_since_test_rows_would_be_trained(tmp_path: Path) -> None:
    paint(*(tmp_path / f"{n}.png" for n in range(4)))
    lines = ["0.png,Colour?,red,train", "1.png,Colour?,blue,test", "2.png,Colour?,red,", "3.png,Colour?,red,train"]
    (tmp_path / "rows.csv").write_text("\n".join(["image,question,answer,split", *lines]))
    with pytest.raises(UserError, match=r"split is '', and other rows have train, val or test; fill it in"):
        understand_folder(tmp_path)
    (tmp_path / "rows.csv").write_text("\n".join(["image,question,answer,set", *(line + "A" for line in lines)]))
    assert understand_folder(tmp_path).rows == 4  # a column of other values names no splits


def test_a_label_file_that_is_not_understood_teaches_nothing_about_what_is_missing(tmp_path: Path) -> None:
    paint(*(tmp_path / "images" / f"{n}.png" for n in range(3)))
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "0.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (labels / "1.txt").write_text("1 0.5 0.5 0.2 0.2\nbroken line\n")
    (labels / "2.txt").write_text("1 0.2 0.5 0.2 0.2\n7 0.5 0.5 0.2 0.2\n")
    (tmp_path / "classes.txt").write_text("cat\n\ndog\n\n")
    found = understand_folder(tmp_path)
    assert {row["image"] for row in rows_of(found)} == {"images/0.png"}
    assert "broken" not in json.dumps(rows_of(found))
    assert "1 image with a line that is not class, x, y, width, height" in left_out(found)
    assert "1 image with a box of a class without a name" in left_out(found)


@pytest.mark.parametrize("flags", [["--class-folders"], []])
def test_no_images_in_class_folders_is_one_line(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    paint(tmp_path / "a.png")
    assert main(None, ["init", str(tmp_path), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_box_with_two_labels_shows_both(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", tmp_path / "b.png")
    shape = {"x": 10, "y": 10, "width": 20, "height": 20}
    tasks = [
        {
            "id": n,
            "data": {"image": f"{name}.png"},
            "annotations": [
                {
                    "result": [
                        {"type": "rectanglelabels", "from_name": "box", "value": shape | {"rectanglelabels": labels}}
                    ]
                }
            ],
        }
        for n, (name, labels) in enumerate([("a", ["cat", "pet"]), ("b", ["dog"])])
    ]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    asked = [row for row in rows_of(understand_folder(tmp_path)) if row["image"] == "a.png"]
    denied = [row["question"] for row in asked if row["answer"].lower().startswith("no")]
    assert not any("pet" in question or "cat" in question for question in denied)


def test_a_column_image_of_the_metadata_does_not_replace_the_file(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,image,text\na.png,http://x/1,A cat.\nb.png,http://x/2,A dog.\n")
    assert [row["image"] for row in rows_of(understand_folder(tmp_path))] == ["a.png", "b.png"]


def test_an_example_is_not_written_by_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(None, ["init", str(tmp_path / "new"), "--example", "--dry-run"]) == 2
    assert "leave one out" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
