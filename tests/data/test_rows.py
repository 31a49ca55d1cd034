"""Rows: policies for long samples and bad images, and the account of every row."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaTokenizer

from lora_llava.core.errors import UserError
from lora_llava.data import Conversation, Template, Turn, encode_conversation
from lora_llava.data.encoded import answer_starts
from lora_llava.data.images.image_sources import FolderImages
from lora_llava.data.selection import Report, build_rows

SHORT = Template(name="short", system="", system_format="", user_format="{}:", stop="</s>")
Build = Callable[..., tuple[list[dict[str, Any]], Report]]


def conversation(row_id: str, question: str, answer: str, *images: str) -> Conversation:
    return Conversation(row_id, (Turn("user", question), Turn("assistant", answer)), images)


A = conversation("a", "Hi", "Yo")  # <s> ▁ H i : ▁ Y o </s>: 9 tokens, 4 of them trained
B = conversation("b", "<image>", "cube", "red.png")  # <s> <image> x 3 : ▁ c u b e </s>: 11 tokens, 6 trained
LONG = conversation("long", "Hi", "abcdefgh")  # 15 tokens, the answer from the sixth on


@pytest.fixture
def build(letters: LlamaTokenizer) -> Build:
    def with_defaults(*conversations: Conversation, **settings: Any) -> tuple[list[dict[str, Any]], Report]:
        defaults = {"tokenizer": letters, "template": SHORT, "num_image_tokens": 3, "max_length": 12}
        return build_rows(conversations, **(defaults | settings))

    return with_defaults


def fails(build: Build, message: str, *conversations: Conversation, **settings: Any) -> None:
    with pytest.raises(UserError) as caught:
        build(*conversations, **settings)
    assert str(caught.value) == message


def test_rows_and_their_account(build: Build, spell: Any) -> None:
    rows, report = build(A, B)
    a_ids, a_labels = spell(("Hi:", False), (" Yo</s>", True))
    b_ids, b_labels = spell(("<image>:", False), (" cube</s>", True))
    assert list(rows) == [
        {"row_id": "a", "input_ids": a_ids, "labels": a_labels, "image_files": []},
        {"row_id": "b", "input_ids": b_ids, "labels": b_labels, "image_files": ["red.png"]},
    ]
    assert report.as_dict() == {
        "rows": 2,
        "used": 2,
        "dropped": {},
        "truncated": 0,
        "tokens": 20,
        "supervised_tokens": 10,
        "longest": 11,
        "repaired": {},
        "sources": {},
    }


def test_a_row_as_long_as_allowed_passes_under_every_policy(build: Build) -> None:
    for policy in ("error", "drop", "truncate_answer"):
        rows, report = build(LONG, max_length=15, on_overlong=policy)
        assert (len(rows[0]["input_ids"]), report.truncated, report.dropped.total()) == (15, 0, 0)


def test_a_longer_row_is_an_error(build: Build) -> None:
    message = (
        "row long: the sample has 15 tokens, over data.max_length 14; raise it, or set data.on_overlong to drop or "
        "truncate_answer"
    )
    fails(build, message, A, LONG, max_length=14)


def test_a_longer_row_is_dropped_and_counted(build: Build) -> None:
    rows, report = build(LONG, A, LONG, max_length=14, on_overlong="drop")
    assert [row["row_id"] for row in rows] == ["a"]
    assert report.as_dict() == {
        "rows": 3,
        "used": 1,
        "dropped": {"overlong": 2},
        "truncated": 0,
        "tokens": 9,
        "supervised_tokens": 4,
        "longest": 9,
        "repaired": {},
        "sources": {},
    }


def test_a_longer_row_loses_the_end_of_its_answer_and_is_counted(build: Build, spell: Any) -> None:
    rows, report = build(A, LONG, max_length=12, on_overlong="truncate_answer")
    ids, labels = spell(("Hi:", False), (" abcdef", True))
    assert rows[1] == {"row_id": "long", "input_ids": ids, "labels": labels, "image_files": []}
    assert report.as_dict() == {
        "rows": 2,
        "used": 2,
        "dropped": {},
        "truncated": 1,
        "tokens": 21,
        "supervised_tokens": 11,
        "longest": 12,
        "repaired": {},
        "sources": {},
    }


def test_a_row_whose_answer_would_vanish_is_refused(build: Build) -> None:
    message = (
        "row long: the sample has 15 tokens and its last answer starts at token 5: a limit of 5 would cut the answer "
        "away; raise data.max_length, or set data.on_overlong to drop"
    )
    fails(build, message, LONG, max_length=5, on_overlong="truncate_answer")


@pytest.mark.parametrize("policy", ["error", "drop", "truncate_answer"])
def test_a_row_that_cannot_be_encoded_is_named_under_every_policy(build: Build, policy: str) -> None:
    fails(build, "row c: turn 1: the answer is empty", A, conversation("c", "Hi", " "), on_overlong=policy)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (conversation("c", "<image>", "Yo"), "row c: 1 <image> placeholders for 0 images; make them equal"),
        (conversation("c", "Hi", "Yo", "red.png"), "row c: 0 <image> placeholders for 1 images; make them equal"),
        (
            conversation("c", "<image> <image>", "Yo", "red.png"),
            "row c: 2 <image> placeholders for 1 images; make them equal",
        ),
    ],
)
def test_placeholders_and_images_are_as_many(build: Build, row: Conversation, message: str) -> None:
    fails(build, message, A, row, on_overlong="drop", on_bad_image="drop")


def test_a_bad_image_is_an_error_that_names_row_and_image(build: Build, image_folder: Path) -> None:
    images = FolderImages(image_folder, 16)
    gone = conversation("c", "<image>", "Yo", "pink.png")
    message = "row c: image pink.png is missing; fix it or set data.on_bad_image=drop"
    fails(build, message, A, B, gone, images=images)
    message = "row b: image red.png has 4 x 4 pixels, over max_image_pixels 15; fix it or set data.on_bad_image=drop"
    fails(build, message, A, B, gone, images=FolderImages(image_folder, 15))


def test_bad_images_are_dropped_and_counted(build: Build, image_folder: Path) -> None:
    (image_folder / "cut.png").write_bytes((image_folder / "blue.png").read_bytes()[:30])
    images = FolderImages(image_folder, 16)
    gone = conversation("c", "<image>", "Yo", "pink.png")
    cut = conversation("d", "<image> <image>", "Yo", "red.png", "cut.png")
    rows, report = build(gone, B, cut, A, LONG, images=images, on_bad_image="drop", on_overlong="drop")
    assert [row["row_id"] for row in rows] == ["b", "a"]
    assert report.as_dict() == {
        "rows": 5,
        "used": 2,
        "dropped": {"bad image": 1, "overlong": 2},
        "truncated": 0,
        "tokens": 20,
        "supervised_tokens": 10,
        "longest": 11,
        "repaired": {},
        "sources": {},
    }


def test_images_are_trusted_where_no_source_is_given(build: Build) -> None:
    rows, _ = build(conversation("c", "<image>", "Yo", "nowhere.png"))
    assert rows[0]["image_files"] == ["nowhere.png"]


def test_no_row_left_is_an_error(build: Build) -> None:
    fails(build, "no row is left of 2: 2 overlong; `lora-llava check` lists them", LONG, LONG, on_overlong="drop")
    fails(build, "the data has no rows; `lora-llava check` reads the same data")


def test_every_row_passes_through_the_progress_bar(build: Build) -> None:
    seen: list[str] = []

    def progress(rows: Any) -> Any:
        for row in rows:
            seen.append(row.row_id)
            yield row

    build(A, LONG, B, on_overlong="drop", progress=progress)
    assert seen == ["a", "long", "b"]


def test_messages_are_one_line(build: Build) -> None:
    with pytest.raises(UserError) as caught:
        build(LONG, max_length=14)
    assert caught.value.exit_code == 2
    assert not re.search(r"\n", str(caught.value))


def test_images_with_different_numbers_of_tokens(build: Build, letters: LlamaTokenizer) -> None:
    two = Conversation("x", (Turn("user", "<image>a<image>"), Turn("assistant", "b")), ("1.png", "2.png"))
    later = (Turn("user", "Hi"), Turn("assistant", "Yo"), Turn("user", "<image>"), Turn("assistant", "Ok"))
    made, known = (two, A, Conversation("z", later, ("2.png",))), {"1.png": 2, "2.png": 5}
    rows, _ = build(*made, num_image_tokens=known, max_length=100)
    image_id = letters.convert_tokens_to_ids("<image>")
    for row, own in zip(made, rows, strict=True):
        messages = [{"role": turn.role, "content": turn.text} for turn in row.turns]
        counts = [known[str(name)] for name in row.images]
        wanted = encode_conversation(messages, tokenizer=letters, template=SHORT, num_image_tokens=counts)
        assert (own["input_ids"], own["labels"]) == (wanted["input_ids"], wanted["labels"])
        assert own["input_ids"].count(image_id) == sum(counts)
    assert rows.lengths.tolist() == [len(row["input_ids"]) for row in rows]  # type: ignore[attr-defined]
    ignored = [[label == -100 for label in row["labels"]][::-1] for row in rows]
    starts = answer_starts(rows.tables[0], np.arange(3)).tolist()  # type: ignore[attr-defined]
    assert starts == [len(each) - each.index(True) for each in ignored]
