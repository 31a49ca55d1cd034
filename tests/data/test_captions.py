"""Captions in LLaVA's `chat.json` form, and what is held back of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.data import Conversation, Turn
from lora_llava.data.captions import load_captions, split_rows
from lora_llava.errors import UserError

TURNS = [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": "a red cube"}]
ROW = {"id": "7", "image": "a/b.png", "conversations": TURNS}
SHAPE = "a row holds id, image and conversations"


def write(folder: Path, content: Any) -> Path:
    file = folder / "chat.json"
    file.write_text(json.dumps(content))
    return file


def test_rows_become_conversations(tmp_path: Path) -> None:
    nameless = {key: ROW[key] for key in ("image", "conversations")}
    turns = (Turn("user", "<image>\nDescribe it."), Turn("assistant", "a red cube"))
    assert load_captions(write(tmp_path, [ROW, nameless, ROW | {"id": 12, "image": "c.png"}])) == [
        Conversation("7", turns, ("a/b.png",)),
        Conversation("1", turns, ("a/b.png",)),
        Conversation("12", turns, ("c.png",)),
    ]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    message = f"data.path: {tmp_path} is missing; it should be a file such as chat.json"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_captions(tmp_path)


def test_what_is_not_json_is_named(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text('[{"id": 1}')
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: not JSON: Expecting ',' delimiter"):
        load_captions(file)


@pytest.mark.parametrize(("content", "kind"), [({"rows": []}, "dict"), (None, "NoneType"), ("x", "str")])
def test_what_is_not_a_list_is_named(tmp_path: Path, content: Any, kind: str) -> None:
    file = write(tmp_path, content)
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: it should hold a list of rows; it holds {kind}$"):
        load_captions(file)


@pytest.mark.parametrize("field", ["image", "conversations"])
def test_a_row_without_a_field_is_named(tmp_path: Path, field: str) -> None:
    row = {key: value for key, value in ROW.items() if key != field}
    with pytest.raises(UserError, match=f"^row 7: '{field}' is missing; {SHAPE}$"):
        load_captions(write(tmp_path, [ROW | {"id": "6"}, row]))


@pytest.mark.parametrize("row", ["text", None, ROW | {"conversations": "text"}, ROW | {"conversations": None}])
def test_a_row_of_another_shape_is_named(tmp_path: Path, row: Any) -> None:
    name = "7" if isinstance(row, dict) else "0"
    with pytest.raises(UserError, match=f"^row {name}: .*{SHAPE}$"):
        load_captions(write(tmp_path, [row]))


@pytest.mark.parametrize("turn", [{"from": "hooman", "value": "x"}, {"value": "x"}, {"from": "human"}])
def test_a_bad_turn_s_row_is_named(tmp_path: Path, turn: dict[str, str]) -> None:
    with pytest.raises(UserError, match="row 7: message 0: "):
        load_captions(write(tmp_path, [ROW | {"conversations": [turn]}]))


@pytest.mark.parametrize("image", [5, None, ["a.png", "b.png"]])
def test_a_picture_s_name_is_text(tmp_path: Path, image: Any) -> None:
    with pytest.raises(UserError, match="row 7: "):
        load_captions(write(tmp_path, [ROW | {"image": image}]))


def rows_of(pictures: list[int]) -> list[Conversation]:
    return [Conversation(str(number), (), (f"{picture}.png",)) for number, picture in enumerate(pictures)]


@given(pictures=st.lists(st.integers(0, 30), min_size=1, max_size=30), share=st.floats(0, 0.5), seed=st.integers(0, 99))
def test_a_split_parts_rows_by_picture(pictures: list[int], share: float, seed: int) -> None:
    rows, held_back = rows_of(pictures), int(share * len(pictures))
    try:
        train, validation = split_rows(rows, held_back, seed)
    except UserError:
        assert len(set(pictures)) <= held_back  # every picture was drawn
        return
    assert sorted([*train, *validation], key=rows.index) == rows
    assert train == [row for row in rows if row in train]
    assert validation == [row for row in rows if row in validation]
    assert {row.images for row in train}.isdisjoint(row.images for row in validation)
    assert len(validation) >= held_back
    assert split_rows(rows, held_back, seed) == (train, validation)


def test_rows_with_pictures_of_their_own_are_held_back_in_number() -> None:
    rows = rows_of(list(range(100)))
    first, second = split_rows(rows, 30, 0), split_rows(rows, 30, 1)
    assert [len(part) for part in (*first, *second)] == [70, 30, 70, 30]
    assert first != second
    assert split_rows(rows, 0, 0) == (rows, [])


@pytest.mark.parametrize("held_back", [3, 4])
def test_something_is_left_to_train_on(held_back: int) -> None:
    message = f"data.validation_rows is {held_back}, of 3 rows; leave some to train on"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        split_rows(rows_of([0, 1, 2]), held_back, 0)


def test_something_is_left_to_train_on_beside_a_shared_picture() -> None:
    with pytest.raises(UserError, match="leave some to train on"):
        split_rows(rows_of([0, 0, 0]), 1, 0)
