"""Cells of tables that hold lists, names of images with spaces, and columns of images that nobody named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_llava.data import Conversation, Turn
from lora_llava.data.formats import IMAGE_NOT_READ, Columns, RowError, likely_image_column, read_row
from lora_llava.data.sources import open_source

ASKED = {"question": "Alike?", "answer": "No."}
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cube."}]


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        ('["01.png", "02.png"]', ("01.png", "02.png")),
        (' [ "01.png" ,\n " 02.png " ] ', ("01.png", "02.png")),
        ("['01.png', '02.png']", ("01.png", "02.png")),
        ("['01.png' '02.png'\n '03.png']", ("01.png", "02.png", "03.png")),
        ('["01.png"]', ("01.png",)),
        ("[]", ()),
        (" 01.png\t", ("01.png",)),
        ("  ", ()),
        (["01.png ", " 02.png"], ("01.png", "02.png")),
        ("a b.png", ("a b.png",)),
    ],
)
@pytest.mark.parametrize("column", ["image", "images", "photo"])
def test_a_cell_may_hold_several_images(cell: Any, names: tuple[str, ...], column: str) -> None:
    assert read_row(ASKED | {column: cell}, 0, columns=Columns(image=column)).images == names


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("[01.png, 02.png]", 'image is \'[01.png, 02.png]\', which is not a JSON list; write it as ["a", "b"]'),
        ('["01.png", ]', 'image is \'["01.png", ]\', which is not a JSON list; write it as ["a", "b"]'),
        ('[["01.png"]]', "an image's name is ['01.png']; it should be a file's name"),
        ("[1, 2]", "an image's name is 1; it should be a file's name"),
        ("[" * 5000 + "]" * 5000, f'image is {"[" * 5000!r:.60}, which is not a JSON list; write it as ["a", "b"]'),
    ],
)
def test_a_cell_that_only_looks_like_a_list_is_refused(cell: str, message: str) -> None:
    with pytest.raises(RowError) as caught:
        read_row(ASKED | {"image": cell}, 0)
    assert (caught.value.kind, str(caught.value)) == ("malformed row", message)


@pytest.mark.parametrize("key", ["conversations", "conversation", "messages"])
def test_a_cell_may_hold_turns(key: str) -> None:
    row = {"image": "01.png", key: json.dumps(TURNS)}
    found = read_row(row, 0)
    assert found == Conversation("0", (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cube.")), ("01.png",))


def test_turns_that_are_no_list_are_refused_row_by_row(tmp_path: Path) -> None:
    bad = ["[{'from': 'human'}]", "hello", "{}", "[1]", '[{"from": "human", "value": "Hi"}]']
    rows = [{"id": f"r{n}", "conversations": text} for n, text in enumerate([*bad, json.dumps(TURNS[:0])])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(open_source(tmp_path / "a.jsonl").read())
    assert [(each.name, each.kind) for each in found if isinstance(each, RowError)] == [
        ("row r0 (a.jsonl, line 1)", "malformed row"),
        ("row r1 (a.jsonl, line 2)", "malformed row"),
        ("row r2 (a.jsonl, line 3)", "malformed row"),
        ("row r3 (a.jsonl, line 4)", "malformed row"),
        ("row r4 (a.jsonl, line 5)", "one-sided conversation"),
        ("row r5 (a.jsonl, line 6)", "empty conversation"),
    ]


def test_an_empty_cell_of_turns_leaves_the_table_s_question() -> None:
    assert read_row(ASKED | {"conversations": ""}, 0).turns[0].text == "Alike?"


def test_choices_may_be_a_list_in_a_cell() -> None:
    for choices in ('["red", "blue"]', "['red', 'blue']", "red | blue"):
        assert read_row(ASKED | {"choices": choices}, 0).extra == {"choices": ["red", "blue"]}


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"image_path": "01.png"}, "image_path"),
        ({"image_path": "01"}, "image_path"),
        ({"Image Path": "01"}, "Image Path"),
        ({"foto": "a/01.JPG "}, "foto"),
        ({"foto": '["1.jpg", "2.jpg"]'}, "foto"),
        ({"foto": ["1.jpg"]}, "foto"),
        ({"foto": {"path": None}}, "foto"),
        ({"note": "see 01.png", "pic": "01.webp"}, "note"),
        ({"file": "notes.txt", "path": "/a/b"}, None),
        ({"note": "what a\nb.png"}, None),
        ({"foto": ""}, None),
        ({"foto": []}, None),
        ({"label": 3, "image_path": None}, None),
    ],
)
def test_a_column_that_evidently_names_images_is_found(row: dict[str, Any], column: str | None) -> None:
    assert likely_image_column(row, set()) == column
    notes = read_row(ASKED | row, 0).notes
    assert notes == (() if column is None else (f"{IMAGE_NOT_READ}{column}",))
    assert read_row(ASKED | row | {"image": "a.png"}, 0).notes == ()
