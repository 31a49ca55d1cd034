"""The reader of JSON streams: what it yields is what `json.loads` reads, at every size of chunk."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lora_llava.data.files import json_stream
from lora_llava.data.files.json_stream import (
    JsonStream,
    MoreTextError,
    NotFiniteError,
    RepeatedKeyError,
    TooLongError,
    array_items,
    is_cut,
    object_entries,
)

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["a", "b", "", "é", 'a"b'])
OBJECTS = st.dictionaries(KEYS, VALUES | st.lists(VALUES, max_size=4), max_size=4)
INDENTS = st.sampled_from([None, 0, 1])
CHUNKS = st.integers(1, 9)


@pytest.fixture(autouse=True)
def chunk_size() -> Iterator[None]:
    before = json_stream._CHUNK
    yield
    json_stream._CHUNK = before


def reader_of(text: str, chunk: int = 1 << 20, strict: bool = False) -> JsonStream:
    json_stream._CHUNK = chunk
    return JsonStream(io.StringIO(text), strict)


def items(text: str, key: str = "a", chunk: int = 1 << 20, strict: bool = True) -> list[Any]:
    return list(array_items(reader_of(text, chunk, strict), key))


@given(content=OBJECTS, indent=INDENTS, ascii_only=st.booleans(), chunk=CHUNKS)
@example(content={"b": [[1], {"a": [2]}], "a": [-1.5e-7, 10, True]}, indent=None, ascii_only=True, chunk=1)
def test_entries_and_items_are_what_json_reads(
    content: dict[str, Any], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    text = json.dumps(content, indent=indent, ensure_ascii=ascii_only) + " \n"
    assert dict(object_entries(reader_of(text, chunk))) == json.loads(text) == content
    found = content.get("a")
    assert items(text, "a", chunk, strict=False) == (found if isinstance(found, list) else [])


@given(before=VALUES, content=VALUES, indent=INDENTS, chunk=CHUNKS)
def test_a_skipped_value_ends_where_the_next_begins(before: Any, content: Any, indent: int | None, chunk: int) -> None:
    reader = reader_of(json.dumps([before, content], indent=indent), chunk)
    found = [reader.skip() if index == 0 else reader.decode() for index in reader.elements()]
    reader.finish("list")
    assert found == [None, content]


@given(content=OBJECTS, indent=INDENTS, chunk=CHUNKS, data=st.data())
def test_a_truncated_object_is_an_error_after_its_complete_entries(
    content: dict[str, Any], indent: int | None, chunk: int, data: st.DataObject
) -> None:
    text = json.dumps(content, indent=indent)
    text = text[: data.draw(st.integers(1, len(text) - 1))]
    found: list[tuple[str, Any]] = []
    with pytest.raises(json.JSONDecodeError) as caught:
        found.extend(object_entries(reader_of(text, chunk)))
    assert is_cut(caught.value)
    whole = found[:-1]  # a number at the end may be cut
    assert whole == list(content.items())[: len(whole)]
    with pytest.raises(json.JSONDecodeError) as caught:
        items(text, chunk=chunk)
    assert is_cut(caught.value)


@given(text=st.text(st.sampled_from('{}[],:"a1-.e \n'), max_size=12), chunk=CHUNKS)
@example(text='{"a":1,}', chunk=1)
@example(text='{"a":[1,]}', chunk=1)
@example(text='{,"a":1}', chunk=1)
@example(text='{"a":[,1]}', chunk=1)
def test_what_json_refuses_is_refused(text: str, chunk: int) -> None:
    def error_of(read: Callable[[], Any]) -> bool:
        try:
            read()
        except ValueError:
            return True
        return False

    def expected() -> None:
        if not isinstance(json.loads(text, object_pairs_hook=json_stream.keys_once), dict):
            raise ValueError

    wrong = error_of(expected)
    assert error_of(lambda: list(object_entries(reader_of(text, chunk)))) == wrong
    assert error_of(lambda: items(text, "a", chunk)) == wrong


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ('{"a" 1, "more": "text that follows"}', 5, "Expecting ':' delimiter"),
        ('{"a": 1 tr, "more": "text that follows"}', 8, "Expecting ',' delimiter"),
        ('{"a": [1 tr, "text that follows"]}', 9, "Expecting ',' delimiter"),
        ('{a: "text that follows, and more"}', 1, "Expecting property name enclosed in double quotes"),
        ('[1, "text that follows, and more"]', 0, "Expecting an object"),
    ],
)
def test_errors_name_the_problem_and_are_not_the_end(text: str, place: int, problem: str, chunk: int) -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        items(text, chunk=chunk)
    assert caught.value.msg == problem
    assert caught.value.doc[caught.value.pos] == text[place]
    assert not is_cut(caught.value)


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize("text", ['{"a": [], "a": []}', '{"a": [{"b": 1, "b": 2}]}', '{"x": {"y": 1, "y": 2}}'])
def test_repeated_keys_are_refused(text: str, chunk: int) -> None:
    with pytest.raises(RepeatedKeyError, match="appears twice in one object; keep one"):
        items(text, chunk=chunk)


def test_the_rest_is_checked_unless_it_is_not_wanted() -> None:
    for rest in ('"b"', ', "a": []}', "} {}", "}]"):
        text = '{"a": [1, 2]' + rest
        with pytest.raises((json.JSONDecodeError, RepeatedKeyError, MoreTextError)):
            items(text)
        assert list(array_items(reader_of(text), "a", to_end=False)) == [1, 2]
    with pytest.raises(MoreTextError, match="more text follows the end of the object"):
        dict(object_entries(reader_of("{} {}")))


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_a_strict_reader_refuses_what_is_not_a_number(word: str, chunk: int) -> None:
    for text in (f'{{"a": [{word}]}}', f'{{"x": [1, {{"y": {word}}}]}}', f'{{"x": {word}}}'):
        with pytest.raises(NotFiniteError, match=f"^{word} is not a number of JSON"):
            items(text, chunk=chunk)
        assert len(list(object_entries(reader_of(text, chunk)))) == 1


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_a_strict_reader_refuses_half_of_a_pair(chunk: int) -> None:
    fine = r'{"a": ["\ud83d\ude00", "\\ud83d"], "\ud83d\ude00": 1}'
    assert items(fine, chunk=chunk) == ["😀", "\\ud83d"]
    for text in (r'{"a": ["x\ud83d"]}', r'{"a": [{"\uDC00": 1}]}', r'{"\ud83d": 1}', r'{"x": ["\ud83d\\ude00"]}'):
        with pytest.raises(UnicodeEncodeError):
            items(text, chunk=chunk)
        assert len(list(object_entries(reader_of(text, chunk)))) == 1


class Endless(io.TextIOBase):
    """A text of many times a pattern, which is never in memory."""

    def __init__(self, start: str, pattern: str, times: int, end: str) -> None:
        self.parts = iter([start, *[pattern * 1000] * times, end])

    def read(self, size: int | None = -1) -> str:
        return next(self.parts, "")


def test_other_values_are_skipped_without_holding_them() -> None:
    row = json.dumps({"image_id": 1, "bbox": [1.5] * 20}) + ", "
    parts = Endless('{"x": [', row, 60, '0], "y": {"z": 1}, "a": [1]}')
    tracemalloc.start()
    assert list(array_items(JsonStream(parts), "a")) == [1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(row) * 60_000 > 6e6
    assert peak < 2e6


def test_items_and_keys_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "LONGEST", 1000)
    json_stream._CHUNK = 100
    for text in ('{"a": ["' + "x" * 3000, '{"x": [[' + "1, " * 2000, '{"' + "x" * 3000):
        with pytest.raises(TooLongError):
            list(array_items(JsonStream(io.StringIO(text)), "a"))
