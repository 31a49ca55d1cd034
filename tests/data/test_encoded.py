"""Encoded tables: row by row what `encode_conversation` gives, in memory and kept, and the rows taken from them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaTokenizer

from lora_llava.core.errors import UserError
from lora_llava.data import (
    Conversation,
    EncodingError,
    OverlongError,
    Template,
    Turn,
    encode_conversation,
    get_template,
)
from lora_llava.data.encoded import EncodedRows, EncodedTable, answer_starts, encode_table
from lora_llava.data.formats import RowError
from lora_llava.data.images.image_id import ImageId
from lora_llava.data.images.image_sources import FolderImages
from lora_llava.data.sources import Read, Source, list_source

SHORT = Template(name="short", system="", system_format="", user_format="{}:", stop="</s>")
NO_IMAGES = FolderImages(Path(), 1)
PIECES = ["a", "The dog", "7.5", " ", "  ", "\n", "é", "e\u0301", "中", "😀", "</s>", "<s>", "#", "USER:", "\u00a0"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)


def conversation(row_id: str, *texts: str, images: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> Conversation:
    turns = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))  # type: ignore[arg-type]
    return Conversation(row_id, turns, images, notes=notes)


def bad(row_id: str, kind: str = "role order", message: str = "turn 0: é\tx") -> RowError:
    error = RowError(kind, message)
    error.row_id = row_id
    return error


def source_of(rows: Sequence[Read], fingerprint: str = "f") -> Source:
    return Source("rows", NO_IMAGES, fingerprint, lambda: iter(rows))


@pytest.fixture(params=["letters", "demo_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> LlamaTokenizer:
    return request.getfixturevalue(request.param)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Any turns, right or wrong, with as many images as placeholders or not."""
    turns = [Turn("system", draw(TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        turns += [Turn("user", draw(TEXTS | st.just("<image>\nWhat?"))), Turn("assistant", draw(TEXTS))]
    images = draw(st.integers(0, 2))
    return Conversation(draw(st.text(max_size=3)), tuple(turns), tuple(f"{n}é.png" for n in range(images)))


def alone(row: Conversation, tokenizer: Any, template: Any, image_tokens: int = 3) -> Any:
    """A row's ids, labels and images, or what is wrong with it, by `encode_conversation`."""
    messages = [{"role": turn.role, "content": turn.text} for turn in row.turns]
    try:
        encoded = encode_conversation(messages, tokenizer=tokenizer, template=template, num_image_tokens=image_tokens)
    except EncodingError as error:
        return (error.kind, str(error))
    count = sum(turn.text.count("<image>") for turn in row.turns)
    if count != len(row.images):
        message = f"{count} <image> placeholders for {len(row.images)} images; make them equal"
        return ("placeholder count", message)
    return {"row_id": row.row_id, **encoded, "image_files": list(row.images)}


def contents(table: EncodedTable, tokenizer: Any) -> list[Any]:
    """Every row of a table, as `alone` gives it."""
    rows = all_rows([table], tokenizer)
    problems = [table.problem(index) for index in range(len(table))]
    return [(p.kind, str(p)) if p else rows[index] for index, p in enumerate(problems)]


def all_rows(tables: Sequence[EncodedTable], tokenizer: Any, max_length: int = 10**6) -> EncodedRows:
    places = [(number, row) for number, table in enumerate(tables) for row in range(len(table))]
    return EncodedRows(
        [sized(table, tokenizer) for table in tables], np.array(places, dtype=np.int64), max_length=max_length
    )


def sized(table: EncodedTable, tokenizer: Any, tokens: Any = 3) -> EncodedTable:
    return table.with_image_tokens(tokenizer.convert_tokens_to_ids("<image>"), tokens)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


FITTING = ["vicuna_v1", "vicuna_v0", "plain", "llama_2", "mistral", "short"]
"""Templates that the tests' tokenizers can encode."""


@settings(deadline=None)
@given(
    rows=st.lists(conversations(), max_size=5),
    template=st.sampled_from(FITTING),
)
@pytest.mark.parametrize("name", ["letters", "demo_tokenizer"])
def test_a_table_is_its_rows_encoded_one_by_one(
    request: pytest.FixtureRequest, cache: Path, name: str, rows: list[Conversation], template: str
) -> None:
    tokenizer = request.getfixturevalue(name)
    chosen = SHORT if template == "short" else get_template(template)
    wanted = [alone(row, tokenizer, chosen) for row in rows]
    source = list_source("rows", rows, NO_IMAGES)
    table = encode_table(source, tokenizer=tokenizer, template=chosen)
    kept = encode_table(source, tokenizer=tokenizer, template=chosen, cache=cache)
    for each in (table, kept):
        assert contents(each, tokenizer) == wanted
        assert [each.row_ids[index] for index in range(len(each))] == [row.row_id for row in rows]
        lengths = [len(row["input_ids"]) if isinstance(row, dict) else 0 for row in wanted]
        good = [index for index, length in enumerate(lengths) if length]
        assert [sized(each, tokenizer).lengths()[index] for index in good] == [lengths[index] for index in good]
        supervised = [sum(label != -100 for label in row["labels"]) if isinstance(row, dict) else 0 for row in wanted]
        assert each.supervised.tolist() == supervised
    assert list(table.columns) == list(kept.columns)
    for column, values in table.columns.items():
        assert kept.columns[column].dtype == values.dtype
        assert kept.columns[column].tolist() == values.tolist()


ROWS: list[Read] = [
    conversation("a", "Hi", "Yo"),  # <s> ▁ H i : ▁ Y o </s>: 9 tokens, 4 of them trained
    bad("b"),
    conversation("c", "<image>", "cube", images=("red.png",), notes=("placeholder added", "leading answer cut")),
    conversation("d", "<image><image>", "x", images=("a é.png", "b.png")),
    bad("e", "empty answer", ""),
]


def test_a_table_s_columns(letters: LlamaTokenizer, spell: Any, tmp_path: Path) -> None:
    for cache in (None, tmp_path, tmp_path):
        table = encode_table(source_of(ROWS), tokenizer=letters, template=SHORT, cache=cache)
        assert len(table) == 5
        assert table.row(0)[0].tolist() == spell(("Hi: Yo</s>", False))[0]
        assert table.row(0)[1].tolist() == [False] * 5 + [True] * 4
        assert table.row(2)[0].tolist() == spell(("<image>: cube</s>", False), image_tokens=1)[0]
        assert table.row(1)[0].tolist() == []
        assert table.starts.tolist() == [0, 9, 9, 18, 25, 25]
        assert table.image_counts.tolist() == [0, 0, 1, 2, 0]
        assert table.supervised.tolist() == [4, 0, 6, 3, 0]
        assert sized(table, letters, 576).lengths().tolist() == [9, 0, 584, 1157, 0]
        assert [table.images(index) for index in range(5)] == [[], [], ["red.png"], ["a é.png", "b.png"], []]
        assert [table.notes[index] for index in range(5)] == ["", "", "placeholder added\0leading answer cut", "", ""]
        assert (table.notes.where().tolist(), table.problems.where().tolist()) == ([2], [1, 4])
        problems = [table.problem(index) for index in range(5)]
        assert [problem and (problem.kind, str(problem)) for problem in problems] == [
            None,
            ("role order", "turn 0: é\tx"),
            None,
            None,
            ("empty answer", ""),
        ]


@pytest.mark.parametrize("rows", [[], [bad("a"), bad("b")]])
def test_a_table_may_hold_nothing(letters: LlamaTokenizer, tmp_path: Path, rows: list[Read]) -> None:
    for cache in (None, tmp_path, tmp_path):
        table = encode_table(source_of(rows), tokenizer=letters, template=SHORT, cache=cache)
        assert (len(table), sized(table, letters).lengths().tolist(), table.supervised.tolist()) == (
            len(rows),
            [0] * len(rows),
            [0] * len(rows),
        )


def test_batches_are_joined_in_order(letters: LlamaTokenizer) -> None:
    rows = [conversation(str(n), f"{n}?", "y" * (n % 7 + 1)) if n % 5 else bad(str(n)) for n in range(1300)]
    table = encode_table(source_of(rows), tokenizer=letters, template=SHORT)
    assert [table.row_ids[n] for n in range(1300)] == [str(n) for n in range(1300)]
    assert table.supervised.tolist() == [n % 7 + 3 if n % 5 else 0 for n in range(1300)]


class Counted:
    """A source that counts how often it is read."""

    def __init__(self, rows: Sequence[Read], fingerprint: str = "f") -> None:
        self.rows, self.times = rows, 0
        self.source = Source("rows", NO_IMAGES, fingerprint, self.read)

    def read(self) -> Iterator[Read]:
        self.times += 1
        return iter(self.rows)


def test_a_kept_table_is_not_read_again(letters: LlamaTokenizer, tmp_path: Path) -> None:
    counted, wrapped = Counted(ROWS), 0

    def progress(rows: Iterable[Read]) -> Iterable[Read]:
        nonlocal wrapped
        wrapped += 1
        return rows

    for _ in range(3):
        encode_table(counted.source, tokenizer=letters, template=SHORT, cache=tmp_path, progress=progress)
    assert (counted.times, wrapped) == (1, 1)
    encode_table(counted.source, tokenizer=letters, template=SHORT)
    assert counted.times == 2


def test_a_table_is_kept_by_source_template_and_tokenizer(
    letters: LlamaTokenizer, demo_tokenizer: LlamaTokenizer, tmp_path: Path
) -> None:
    first, other = Counted(ROWS), Counted(ROWS, "g")
    cases: list[tuple[Counted, Any, Any]] = [
        (first, letters, SHORT),
        (other, letters, SHORT),
        (first, demo_tokenizer, SHORT),
        (first, letters, replace(SHORT, system="Be kind.", system_format="{}")),
        (first, letters, "vicuna_v1"),
        (first, letters, get_template("vicuna_v1", "")),
    ]
    for count in (len(cases), len(cases)):
        for counted, tokenizer, template in cases:
            encode_table(counted.source, tokenizer=tokenizer, template=template, cache=tmp_path)
        assert first.times + other.times == count
        assert len(list((tmp_path / "encoded").iterdir())) == count


def test_half_a_kept_table_is_not_used(letters: LlamaTokenizer, tmp_path: Path) -> None:
    counted = Counted(ROWS)
    encode_table(counted.source, tokenizer=letters, template=SHORT, cache=tmp_path)
    (folder,) = (tmp_path / "encoded").iterdir()
    (folder / "table.json").unlink()
    (folder / "ids.npy").write_bytes(b"x")
    table = encode_table(counted.source, tokenizer=letters, template=SHORT, cache=tmp_path)
    assert counted.times == 2
    assert [table.row_ids[n] for n in range(5)] == list("abcde")
    assert list((tmp_path / "encoded").iterdir()) == [folder]


@pytest.mark.parametrize("name", ["table.json", "ids.npy", "starts.npy", "row_ids.npy"])
@pytest.mark.parametrize("size", [0, None])
def test_a_kept_table_with_a_spoilt_file_is_made_again(
    letters: LlamaTokenizer, tmp_path: Path, name: str, size: int | None
) -> None:
    source = source_of(ROWS)
    encode_table(source, tokenizer=letters, template=SHORT, cache=tmp_path)
    (folder,) = (tmp_path / "encoded").iterdir()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) - 5 if size is None else size])
    table = encode_table(source, tokenizer=letters, template=SHORT, cache=tmp_path)
    assert [table.row_ids[n] for n in range(5)] == list("abcde")


@pytest.mark.parametrize("name", ["ids.npy", "trained.npy", "images.npy", "table.json"])
def test_a_flipped_bit_in_a_kept_table_is_seen(
    letters: LlamaTokenizer, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = Counted(ROWS)
    encode_table(counted.source, tokenizer=letters, template=SHORT, cache=tmp_path)
    (folder,) = (tmp_path / "encoded").iterdir()
    file, state = folder / name, (folder / name).stat()
    whole = file.read_bytes()
    file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    encode_table(counted.source, tokenizer=letters, template=SHORT, cache=tmp_path)
    assert counted.times == 2
    assert file.read_bytes() == whole
    assert f"({name} has changed); writing it again" in capsys.readouterr().err


def test_a_full_disk_while_rows_are_encoded_is_one_line(
    letters: LlamaTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*rest: Any) -> None:
        raise OSError("12800 requested and 0 written")  # as numpy's tofile does, without errno

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"^the disk is full: .*encoded has [\d,]+ bytes free; make room, or set LORA_"):
        encode_table(source_of(ROWS), tokenizer=letters, template=SHORT, cache=tmp_path)
    assert list((tmp_path / "encoded").iterdir()) == []


def test_a_source_that_breaks_off_leaves_nothing(letters: LlamaTokenizer, tmp_path: Path) -> None:
    def read() -> Iterator[Read]:
        yield ROWS[0]
        raise OSError("gone")

    with pytest.raises(OSError, match=r"^gone$"):
        encode_table(Source("rows", NO_IMAGES, "f", read), tokenizer=letters, template=SHORT, cache=tmp_path)
    assert list(tmp_path.rglob("*.npy")) == []


def test_rows_are_taken_from_several_tables(letters: LlamaTokenizer, spell: Any) -> None:
    second = [conversation("x", "<image>", "abcdef", images=("red.png",)), conversation("y", "Hi", "Yo")]
    tables = [encode_table(source_of(rows), tokenizer=letters, template=SHORT) for rows in (ROWS, second)]
    rows = all_rows(tables, letters).take([5, 0, 2, 3, 6])
    assert [row["row_id"] for row in rows] == ["x", "a", "c", "d", "y"]
    ids, labels = spell(("<image>:", False), (" abcdef</s>", True))
    assert rows[0] == {"row_id": "x", "input_ids": ids, "labels": labels, "image_files": [ImageId(1, "red.png")]}
    assert [rows.image_files(n) for n in range(5)] == [
        [ImageId(1, "red.png")],
        [],
        [ImageId(0, "red.png")],
        [ImageId(0, "a é.png"), ImageId(0, "b.png")],
        [],
    ]
    assert rows.lengths.tolist() == [len(row["input_ids"]) for row in rows] == [13, 9, 11, 11, 9]
    assert rows.supervised.tolist() == [8, 4, 6, 3, 4]
    assert rows.image_counts().tolist() == [1, 0, 1, 2, 0]
    assert rows[1:3] == [rows[1], rows[2]]
    assert rows[-1] == rows[4]
    assert rows.take(np.array([4, 4]))[:] == [rows[4], rows[4]]
    assert len(rows.take([])) == 0
    assert all_rows(tables[1:], letters).image_files(0) == ["red.png"]


@pytest.mark.parametrize("max_length", [6, 7, 8, 13, 14])
def test_long_rows_are_cut_and_counted_as_cut(letters: LlamaTokenizer, max_length: int) -> None:
    made = [conversation("x", "<image>", "abcdef", images=("red.png",)), conversation("y", "Hi", "Yo")]
    rows = all_rows([encode_table(source_of(made), tokenizer=letters, template=SHORT)], letters, max_length)
    assert rows.lengths.tolist() == [len(row["input_ids"]) for row in rows] == [min(13, max_length), min(9, max_length)]
    assert rows.supervised.tolist() == [sum(label != -100 for label in row["labels"]) for row in rows]
    assert rows.supervised.tolist() == [min(8, max_length - 5), min(4, max_length - 5)]


def test_a_row_that_loses_its_answer_is_refused(letters: LlamaTokenizer) -> None:
    table = encode_table(source_of([ROWS[0]]), tokenizer=letters, template=SHORT)
    with pytest.raises(OverlongError):
        all_rows([table], letters, 5)


def test_where_last_answers_begin(tokenizer: LlamaTokenizer) -> None:
    made = [
        conversation("x", "<image>a<image>", "b", "c", "de", images=("1.png", "2.png")),
        conversation("y", "Hi", "Yo"),
        conversation("z", "Hi", "Yo", "<image>", "Yo", images=("1.png",)),
    ]
    table = encode_table(source_of(made), tokenizer=tokenizer, template=SHORT)
    found = answer_starts(sized(table, tokenizer), np.array([2, 0, 1])).tolist()
    rows = all_rows([table], tokenizer)
    labels = [rows[n]["labels"] for n in (2, 0, 1)]
    assert found == [len(each) - [label == -100 for label in each][::-1].index(True) for each in labels]


@pytest.mark.parametrize("used", [{"truncation": True, "max_length": 5}, {"padding": "max_length", "max_length": 99}])
def test_an_earlier_call_of_the_tokenizer_changes_nothing(
    letters: LlamaTokenizer, spell: Any, used: dict[str, Any]
) -> None:
    try:
        letters("abc", **used)
        table = encode_table(source_of([ROWS[0]]), tokenizer=letters, template=SHORT)
        assert table.row(0)[0].tolist() == spell(("Hi: Yo</s>", False))[0]
        encoded = encode_conversation(
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}],
            tokenizer=letters,
            template=SHORT,
            num_image_tokens=3,
        )
        assert encoded["input_ids"] == spell(("Hi: Yo</s>", False))[0]
    finally:
        letters("abc")


def test_invalid_unicode_is_a_problem_of_its_row(letters: LlamaTokenizer) -> None:
    rows = [conversation("a", "Hi \ud83d", "Yo"), conversation("b", "Hi", "Yo")]
    table = encode_table(source_of(rows), tokenizer=letters, template=SHORT)
    assert table.problem(0) is not None
    assert table.problem(1) is None
