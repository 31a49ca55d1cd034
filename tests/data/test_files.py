"""Files of rows: complete rows out of every kind of file, one at a time, and what is said of a broken one."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lora_llava.core.errors import UserError
from lora_llava.core.storage import file_hash
from lora_llava.data.files import json_stream
from lora_llava.data.files.row_files import data_file, estimate_rows, iterate_rows, parquet_columns

ROWS: list[Any] = [{"id": "1", "text": "é"}, {"id": "2", "text": 'a "b", {c} [d]'}, {"id": 3, "deep": [{"x": [1, {}]}]}]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3), max_size=4)
CHUNKS = st.integers(1, 9)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def fails(file: Path, message: str) -> None:
    with pytest.raises(UserError) as caught:
        list(iterate_rows(file))
    assert str(caught.value) == f"{file}{message}"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def in_chunks(file: Path, chunk: int) -> list[Any]:
    """A file's rows, read so many characters at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        return list(iterate_rows(file))


@given(rows=OBJECTS, indent=st.sampled_from([None, 0, 1]), ascii_only=st.booleans(), chunk=CHUNKS)
def test_a_list_of_rows_is_what_json_reads(
    folder: Path, rows: list[Any], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    assert in_chunks(write(folder, "rows.json", text), chunk) == json.loads(text) == rows


@given(rows=st.lists(VALUES, max_size=4), chunk=CHUNKS)
@example(rows=[1.5], chunk=3)
@example(rows=[1e16], chunk=3)
@example(rows=[1e16], chunk=4)
def test_a_list_of_anything_is_what_json_reads(folder: Path, rows: list[Any], chunk: int) -> None:
    assert in_chunks(write(folder, "rows.json", json.dumps(rows)), chunk) == rows


@given(rows=OBJECTS.filter(bool), indent=st.sampled_from([None, 1]), chunk=CHUNKS, data=st.data())
def test_a_truncated_list_yields_its_complete_rows_and_an_error(
    folder: Path, rows: list[Any], indent: int | None, chunk: int, data: st.DataObject
) -> None:
    text = json.dumps(rows, indent=indent)
    file = write(folder, "rows.json", text[: data.draw(st.integers(1, len(text.rstrip("]\n")) - 1))])
    got: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        with pytest.raises(UserError) as caught:
            got.extend(iterate_rows(file))
    assert got == rows[: len(got)]
    assert str(caught.value).startswith(f"{file}, line ")
    assert str(caught.value).endswith(f", after {len(got)} complete rows and the file ends there: it is truncated")


TRUNCATED = "and the file ends there: it is truncated"
CUT_NUMBER = (
    ", line 1: not JSON: Expecting ',' delimiter, after 0 complete rows and the file ends there: it is truncated"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", ", line 1: not JSON: Expecting value, after 0 complete rows and the file ends there: it is truncated"),
        (
            '[\n{"a": 1},\n{"b": 2}\n',
            f", line 4: not JSON: Expecting ',' delimiter, after 2 complete rows {TRUNCATED}",
        ),
        (
            '[\n{"a": 1},\n{"b":\n "no en',
            ", line 4: not JSON: Unterminated string starting at, after 1 complete rows and the file ends there: "
            "it is truncated",
        ),
        ('[{"a": -1.', CUT_NUMBER),
        ('[{"a": -1.5e', CUT_NUMBER),
        ('[{"a": -1E+', CUT_NUMBER),
        ('[{"a": -1e-', CUT_NUMBER),
        (
            '[{"a": 1},',
            ", line 1: not JSON: Expecting value, after 1 complete rows and the file ends there: it is truncated",
        ),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_where_a_list_is_cut_off_is_named(tmp_path: Path, text: str, message: str, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        fails(write(tmp_path, "rows.json", text), message)


MORE = "".join(f',\n{{"c": {number}}}' for number in range(50))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"a": 1},\n{"b" 2}' + MORE + "\n]", ", line 3: not JSON: Expecting ':' delimiter, after 1 complete rows"),
        ('[\n{"a": 1}\n{"b": 2}' + MORE + "\n]", ", line 3: not JSON: Expecting ',' delimiter, after 1 complete rows"),
        (
            "[\n{'a': 1}" + MORE + "\n]",
            ", line 2: not JSON: Expecting property name enclosed in double quotes, after 0 complete rows",
        ),
    ],
)
def test_a_slip_in_the_middle_is_not_the_file_s_end(tmp_path: Path, text: str, message: str) -> None:
    fails(write(tmp_path, "rows.json", text), message)


@pytest.mark.parametrize("more", ['[{"b": 2}]', ', {"b": 2}]', "x"])
def test_nothing_follows_a_list(tmp_path: Path, more: str) -> None:
    file = write(tmp_path, "rows.json", f'[{{"a": 1}}]\n{more}\n')
    with pytest.raises(UserError):
        list(iterate_rows(file))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_nesting_without_end_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError):
        list(iterate_rows(write(tmp_path, name, "[" * 100_000)))


@pytest.mark.parametrize(
    ("content", "kind"),
    [({"rows": []}, "dict; save only the list under rows"), (None, "NoneType"), ("x", "str"), (5, "int")],
)
def test_what_is_not_a_list_is_named(tmp_path: Path, content: Any, kind: str) -> None:
    file = write(tmp_path, "chat.json", json.dumps(content, indent=1))
    fails(file, f": it should be a list of rows, not {kind}")


def test_what_is_not_json_is_named(tmp_path: Path) -> None:
    fails(write(tmp_path, "chat.json", "id: 1\n"), ", line 1: not JSON: Expecting value")
    fails(write(tmp_path, "chat.json", '{"a": 1,\n "b" 2}'), ", line 2: not JSON: Expecting ':' delimiter")
    fails(write(tmp_path, "chat.jsonl", '{"a": 1}\n\n{"b": }\n'), ", line 3: not JSON: Expecting value")
    fails(write(tmp_path, "chat.json", '{"a": 1}\n\n{"b": }\n'), ", line 3: not JSON: Expecting value")


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.json"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n \n"])
@pytest.mark.parametrize("break_", ["\n", "\r\n", "\n\n"])
def test_a_row_a_line(tmp_path: Path, name: str, start: str, break_: str) -> None:
    text = start + break_.join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    assert list(iterate_rows(write(tmp_path, name, text))) == ROWS


def test_a_line_break_inside_a_text_does_not_end_a_row(tmp_path: Path) -> None:
    row = {"a": "one\u2028two\x85three\x0cfour"}
    text = json.dumps(row, ensure_ascii=False)
    assert "\u2028" in text
    assert list(iterate_rows(write(tmp_path, "a.jsonl", f"{text}\n{text}"))) == [row, row]


def test_a_list_may_begin_with_a_mark_and_white_space(tmp_path: Path) -> None:
    assert list(iterate_rows(write(tmp_path, "a.JSON", "\ufeff \n\t" + json.dumps(ROWS) + "\n\n"))) == ROWS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv"])
def test_an_empty_file_or_list_has_no_rows(tmp_path: Path, name: str) -> None:
    content = "[ ]" if name == "a.json" else ""
    assert list(iterate_rows(write(tmp_path, name, content))) == []


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_rows_come_before_the_file_is_read_to_its_end(tmp_path: Path, name: str) -> None:
    opening, between = ("[", ",\n") if name == "a.json" else ("", "\n")
    text = opening + between.join(json.dumps({"n": n, "text": "x" * 1000}) for n in range(5000))
    rows = iterate_rows(write(tmp_path, name, text.encode() + b"\n\xff\xff"))
    assert [row["n"] for row in itertools.islice(rows, 3)] == [0, 1, 2]
    with pytest.raises(UserError):
        list(rows)


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=6)


@given(table=st.lists(st.tuples(CELLS, CELLS), max_size=4), mark=st.booleans(), kind=st.sampled_from(";,\t"))
def test_tables_are_read_as_written(folder: Path, table: list[tuple[str, str]], mark: bool, kind: str) -> None:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=kind, quoting=csv.QUOTE_ALL)
    writer.writerows([("question", "answer"), *table])
    text = ("\ufeff" if mark else "") + stream.getvalue()
    file = write(folder, "a.tsv" if kind == "\t" else "a.csv", text)
    assert list(iterate_rows(file)) == [{"question": first, "answer": second} for first, second in table]


def test_a_table_s_header_decides_its_separator(tmp_path: Path) -> None:
    assert list(iterate_rows(write(tmp_path, "a.csv", "a;b\n1,5;2\n"))) == [{"a": "1,5", "b": "2"}]
    assert list(iterate_rows(write(tmp_path, "a.csv", "a,b\n1;5,2\n"))) == [{"a": "1;5", "b": "2"}]
    assert list(iterate_rows(write(tmp_path, "a.tsv", "a;b\tc,d\n1\t2\n"))) == [{"a;b": "1", "c,d": "2"}]


def test_a_table_s_fields_may_be_long(tmp_path: Path) -> None:
    text = "x" * 200_000  # over the csv module's own limit
    assert list(iterate_rows(write(tmp_path, "a.csv", f"a,b\n{text},2\n"))) == [{"a": text, "b": "2"}]


FIELDS = "; put text that contains the separator in double quotes"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n1\n", f", line 3: 1 fields, but the first line has 2{FIELDS}"),
        ("a,b\n1,2,3,4\n", f", line 2: 4 fields, but the first line has 2{FIELDS}"),
        ('a,b\n"1\n",2\n1,2,3\n', f", line 4: 3 fields, but the first line has 2{FIELDS}"),
    ],
)
def test_a_line_with_another_number_of_fields_is_named(tmp_path: Path, text: str, message: str) -> None:
    fails(write(tmp_path, "a.csv", text), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a,b\n"x"y,1\n', ", line 2: not a table: ',' expected after '\"'"),
        ('a,b\n1,2\n3,"x', ", line 3: not a table: unexpected end of data"),
    ],
)
def test_a_broken_line_of_a_table_is_named(tmp_path: Path, text: str, message: str) -> None:
    fails(write(tmp_path, "a.csv", text), message)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv"])
def test_another_encoding_is_named(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name, '[{"a,b": "какой это"}]'.encode("cp1251"))
    fails(file, ": not UTF-8: invalid continuation byte at byte 10; save it as UTF-8")
    file = write(tmp_path, name, "x".encode("utf-16") + b"x")
    fails(file, ": not UTF-16, which its first bytes indicate: truncated data at byte 4; save it as UTF-8")


def test_where_another_encoding_begins_is_reported_in_a_long_file(tmp_path: Path) -> None:
    file = write(tmp_path, "a.jsonl", b'{"a": 1}\n' * 5000 + b'"\xe9\x81"\n')
    fails(file, ": not UTF-8: invalid continuation byte at byte 45001; save it as UTF-8")


def test_parquet_gives_a_stored_image_s_path_and_not_its_bytes(tmp_path: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    schema = pa.schema([("id", pa.int64()), ("image", image), ("images", pa.list_(image)), ("conversations", turns)])
    said = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    stored = {"bytes": b"\xff" * 9, "path": "a.png"}
    rows = [
        {"id": 1, "image": stored, "images": [stored, stored], "conversations": said},
        {"id": 2, "image": stored | {"path": None}, "images": [], "conversations": []},
        {"id": 3, "image": None, "images": None, "conversations": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
    assert list(iterate_rows(tmp_path / "a.parquet")) == [
        {"id": 1, "image": {"path": "a.png"}, "images": [{"path": "a.png"}] * 2, "conversations": said},
        {"id": 2, "image": {"path": None}, "images": [], "conversations": []},
        {"id": 3, "image": None, "images": None, "conversations": None},
    ]
    assert parquet_columns(tmp_path / "a.parquet") == {
        "id": False,
        "image": True,
        "images": True,
        "conversations": True,
    }


def test_parquet_gives_its_rows_in_order(tmp_path: Path) -> None:
    rows = [{"n": number, "answer": str(number)} for number in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    assert list(iterate_rows(tmp_path / "a.parquet")) == rows


def test_what_is_not_parquet_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, "a.parquet", "PAR1 and no more")
    with pytest.raises(UserError) as caught:
        list(iterate_rows(file))
    assert str(caught.value).startswith(f"{file}: not a Parquet file: ")


def test_a_file_or_a_folder_with_one_is_found(tmp_path: Path) -> None:
    file = write(tmp_path, "chat.JSON", "[]")
    write(tmp_path, "README.md", "")
    (tmp_path / "images").mkdir()
    assert data_file(file) == file
    assert data_file(str(file)) == file
    assert data_file(tmp_path) == file


KINDS = ".json, .jsonl, .ndjson, .csv, .tsv, .parquet"


def test_paths_without_rows_are_refused(tmp_path: Path) -> None:
    def reported(path: Path, message: str) -> None:
        with pytest.raises(UserError) as caught:
            data_file(path, "data.sources.0.path")
        assert str(caught.value) == f"data.sources.0.path: {path} {message}"

    reported(tmp_path, f"is a folder; name its file of rows ({KINDS}); it has: none")
    reported(tmp_path / "chat.json", "is missing; it should be a file such as chat.json")
    reported(write(tmp_path, "chat.txt", ""), f"is of an unknown kind; use one of {KINDS}")
    for name in "gfedcba":
        write(tmp_path, f"{name}.json", "[]")
    reported(
        tmp_path,
        f"is a folder; name its file of rows ({KINDS}); it has: a.json, b.json, c.json, d.json, e.json",
    )


def test_a_file_s_hash_is_that_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    assert file_hash(write(tmp_path, "a", content)) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("count", [0, 7, 3000])
def test_rows_are_estimated_for_a_bar(tmp_path: Path, name: str, count: int) -> None:
    rows = [{"question": f"What is {n}?", "answer": "x" * (n % 50)} for n in range(count)]
    file = tmp_path / name
    if name == "a.csv":
        file.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in rows))
    else:
        lines = [json.dumps(row) for row in rows]
        file.write_text("[" + ",\n".join(lines) + "]" if name == "a.json" else "\n".join(lines))
    found = estimate_rows(file)
    assert found == count if count < 500 else abs(found - count) < 0.1 * count
