"""Files of rows as people have them: encodings, shards, empty rows, and where in its file each row is."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_llava.core.errors import UserError
from lora_llava.data.files.cleaned_copy import write_set_without, write_without
from lora_llava.data.files.row_files import data_files, iterate_rows, placed_rows
from lora_llava.data.files.text_encoding import encoding_problem, foreign_encoding, text_encoding
from lora_llava.data.folder import understand_folder
from lora_llava.data.sources import open_source

WESTERN = {"question": "Was ist das größte “Café”?", "answer": "L'été – 5 €"}
ASIAN = {"question": "这是什么颜色？", "answer": "красный 赤"}
NAMES = ["a.csv", "a.tsv", "a.json", "a.jsonl"]


def text_of(name: str, rows: list[dict[str, str]]) -> str:
    if name.endswith(".json"):
        return json.dumps(rows, ensure_ascii=False)
    if name.endswith(".jsonl"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    sign = "\t" if name.endswith(".tsv") else ";"
    return "\n".join(sign.join(cells) for cells in [list(rows[0]), *(list(row.values()) for row in rows)]) + "\n"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("codec", "mark", "named", "row"),
    [
        ("cp1252", b"", "cp1252", WESTERN),
        ("utf-16-le", b"\xff\xfe", "UTF-16", WESTERN),
        ("utf-16-be", b"\xfe\xff", "UTF-16", ASIAN),
        ("utf-16-le", b"", "UTF-16-LE", WESTERN),
        ("utf-16-be", b"", "UTF-16-BE", WESTERN),
        ("utf-16-le", b"", "UTF-16-LE", ASIAN),
        ("utf-8", b"\xef\xbb\xbf", None, ASIAN),
        ("utf-8", b"", None, WESTERN),
    ],
)
def test_a_text_is_decoded_as_its_bytes_say(
    tmp_path: Path, name: str, codec: str, mark: bytes, named: str | None, row: dict[str, str]
) -> None:
    file = tmp_path / name
    file.write_bytes(mark + text_of(name, [row] * 3).encode(codec))
    assert list(iterate_rows(file)) == [row] * 3
    assert foreign_encoding(file) == named
    remark = [("encoding", f"{name}: read as {named}; save it as UTF-8 if letters look wrong")]
    assert open_source(file).remarks() == (remark if named else [])


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        ("Какой цвет?", "cp1251"),
        ("Какой цвет?", "koi8-r"),
        ("什么颜色？", "gbk"),
        ("これは何ですか。", "shift-jis"),
        ("これは何", "euc-jp"),
        ("Łódź, żółw", "cp1250"),
        ("grün und größer", "mac_roman"),
        ("\x00\x01é\x00", "latin-1"),
    ],
)
def test_bytes_that_are_not_western_are_not_guessed(tmp_path: Path, text: str, codec: str) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"question,answer\n" + text.encode(codec) + b",yes\n")
    assert str(encoding_problem(file)).startswith("not UTF-8: ")
    assert foreign_encoding(file) is None
    with pytest.raises(UserError, match=r"a.csv: not UTF-8: .* at byte [0-9]+; save it as UTF-8"):
        list(iterate_rows(file))


def test_utf_8_with_a_broken_byte_is_not_taken_for_cp1252(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"q,a\n" + "é,ü\n".encode() * 50 + b"\xe9,1\n")
    assert encoding_problem(file) == "not UTF-8: invalid continuation byte at byte 304; save it as UTF-8"


def test_the_first_letter_that_is_not_ascii_may_come_late(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"q,a\n" + b"x,1\n" * 600_000 + "é,2\n".encode("cp1252"))
    assert text_encoding(file) == "cp1252"
    assert list(iterate_rows(file))[-1] == {"q": "é", "a": "2"}


def places(file: Path) -> list[str]:
    return [place for place, _ in placed_rows(file)]


def test_a_row_is_where_its_file_has_it(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text('q,a\n"one\ntwo\nthree",1\n\n,\nfour,2\n"five\r\nsix",3\nseven,4\n')
    assert places(table) == ["line 2", "line 7", "line 8", "line 10"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"n": 1}\n\n{"n": 2}\n')
    assert places(lines) == ["line 1", "line 3"]
    listed = tmp_path / "a.json"
    listed.write_text('[\n\n{"n": 1},\n{"n":\n 2}]')
    assert places(listed) == ["index 0", "index 1"]
    (tmp_path / "b.json").write_text('{"n": 1}\n{"n": 2}\n')
    assert places(tmp_path / "b.json") == ["line 1", "line 2"]
    pq.write_table(pa.table({"n": [1, 2]}), tmp_path / "a.parquet")
    assert places(tmp_path / "a.parquet") == ["index 0", "index 1"]


def test_a_row_without_an_id_is_named_by_its_place_and_one_with_an_id_by_both(tmp_path: Path) -> None:
    file = tmp_path / "q.csv"
    file.write_text('id,question,answer\na,"Is it\nso?",Yes\n,Why?,No\nb,,No\n')
    rows = list(open_source(file).read())
    assert [(row.row_id, row.name) for row in rows] == [
        ("a", "row a (q.csv, line 2)"),
        ("1", "q.csv, line 4"),
        ("b", "row b (q.csv, line 5)"),
    ]


def test_empty_rows_of_a_spreadsheet_are_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "q.csv"
    file.write_text("question;answer;;\nWhy?;No;;\n;;;\n ;;;\nHow?;So;;\n;;;\n")
    source = open_source(file)
    assert [row.row_id for row in source.read()] == ["0", "1"]
    assert source.remarks() == [("empty rows", "q.csv: 3 empty rows are left out")]
    target, count = write_without(file, {0})
    assert (count, [row["question"] for row in iterate_rows(target)]) == (1, ["How?"])


SHARDS = {
    "parquet": lambda file, rows: pq.write_table(pa.Table.from_pylist(rows), file),
    "json": lambda file, rows: file.write_text(json.dumps(rows)),
    "jsonl": lambda file, rows: file.write_text("".join(json.dumps(row) + "\n" for row in rows)),
}


def write_shards(folder: Path, names: list[str], each: int = 2, start: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in names]
    for place, file in enumerate(files):
        rows: list[dict[str, Any]] = [
            {"id": f"r{n}", "question": f"Is it {n}?", "answer": "Yes."}
            for n in range(start + place * each, start + (place + 1) * each)
        ]
        if file.suffix == ".csv":
            with file.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            SHARDS[file.suffix[1:]](file, rows)
    return files


@pytest.mark.parametrize("suffix", ["parquet", "json", "jsonl", "csv"])
@pytest.mark.parametrize("form", ["train-{0:05d}-of-00003", "train-{0:05d}-of-00003-0123456789abcdef", "data_{1}_of_3"])
def test_shards_are_one_data_set_by_any_of_their_names(tmp_path: Path, suffix: str, form: str) -> None:
    files = write_shards(tmp_path, [f"{form.format(n, n + 1)}.{suffix}" for n in range(3)])
    for path in (tmp_path, *files):
        assert data_files(path) == tuple(files)
    rows = list(open_source(tmp_path).read())
    assert [row.row_id for row in rows] == [f"r{n}" for n in range(6)]
    place = "line 3" if suffix == "csv" else "line 2" if suffix == "jsonl" else "index 1"
    assert rows[3].name == f"row r3 ({files[1].name}, {place})"
    found = understand_folder(tmp_path)
    assert (found.rows, found.files, found.file) == (6, tuple(files), files[0])


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_missing_shard_is_named(tmp_path: Path, gone: int) -> None:
    files = write_shards(tmp_path, [f"train-{n:05d}-of-00003.jsonl" for n in range(3)])
    files[gone].unlink()
    message = f"lacks train-0000{gone}-of-00003.jsonl, of the 3 shards of train; add the missing files"
    for path in (tmp_path, *files):
        with pytest.raises(UserError) as caught:
            data_files(path, "data.path")
        assert str(caught.value) == f"data.path: {tmp_path} {message}"
    with pytest.raises(UserError, match=message):
        understand_folder(tmp_path)


def test_what_no_set_is_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "twice", ["a-0-of-1-aaaaaa.json", "a-0-of-1-bbbbbb.json"])
    with pytest.raises(UserError, match="are the same shard; keep one"):
        data_files(tmp_path / "twice")
    write_shards(tmp_path / "over", ["a-00000-of-00001.json", "a-00005-of-00001.json"])
    with pytest.raises(UserError, match=r"a-00005-of-00001.json in .* has a number over its total"):
        data_files(tmp_path / "over")
    write_shards(tmp_path / "many", ["a-00000-of-99999999999.json"])
    with pytest.raises(UserError, match=r"lacks a-00001-of-99999999999.json, .* and 99,999,999,993 more"):
        data_files(tmp_path / "many")


def test_a_copy_of_a_data_set_on_the_hub_has_its_splits(tmp_path: Path) -> None:
    train = write_shards(tmp_path / "data", [f"train-{n:05d}-of-00002.parquet" for n in range(2)])
    test = write_shards(tmp_path / "data", ["test-00000-of-00001.parquet"], start=10)
    dev = write_shards(tmp_path / "data", ["validation-00000-of-00001.parquet"], start=20)
    (tmp_path / "dataset_infos.json").write_text("{}")
    found = understand_folder(tmp_path)
    assert (found.files, found.test, found.validation) == (tuple(train), test[0], dev[0])
    for split, files in (("train", train), ("test", test), ("validation", dev), ("val", dev)):
        assert data_files(tmp_path, split=split) == data_files(tmp_path / "data", split=split) == tuple(files)
    with pytest.raises(UserError, match=r"is a folder; name its file of rows .* it has: data/test-00000"):
        data_files(tmp_path, split="other")


def test_splits_may_be_folders(tmp_path: Path) -> None:
    train = write_shards(tmp_path / "train", ["0-of-2.csv", "1-of-2.csv"])
    test = write_shards(tmp_path / "test", ["0-of-1.csv"])
    found = understand_folder(tmp_path)
    assert (found.files, found.test) == (tuple(train), test[0])


def test_the_cleaned_copies_of_shards_are_a_set_again(tmp_path: Path) -> None:
    files = write_shards(tmp_path, [f"train-{n:05d}-of-00003.jsonl" for n in range(3)])
    done = list(write_set_without(files, {1, 2}))
    targets = [tmp_path / f"train.fixed-{n:05d}-of-00003.jsonl" for n in range(3)]
    assert done == [(files[0], targets[0], 1, 1), (files[1], targets[1], 1, 1), (files[2], targets[2], 2, 0)]
    assert data_files(targets[0]) == tuple(targets)
    assert [row.row_id for row in open_source(targets[2]).read()] == ["r0", "r3", "r4", "r5"]
    with pytest.raises(UserError, match="already exists"):
        list(write_set_without(files, {1}))


@pytest.mark.parametrize("mark", [b"", b"\xff\xfe"])
def test_the_cleaned_copy_of_another_encoding_is_utf_8(tmp_path: Path, mark: bytes) -> None:
    file = tmp_path / "a.csv"
    text = "question;answer\r\ngrün?;ja\r\nrot?;nein\r\n"
    file.write_bytes(mark + text.encode("utf-16-le" if mark else "cp1252"))
    target, count = write_without(file, {1})
    assert (count, target.read_bytes()) == (1, "\ufeffquestion;answer\r\ngrün?;ja\r\n".encode())


def test_the_line_in_which_excel_names_the_delimiter(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"SEP=;\r\nquestion;answer\r\nWhat, and why?;So.\r\nWho?;I.\r\n")
    assert [place for place, _ in placed_rows(file)] == ["line 3", "line 4"]
    assert next(iterate_rows(file)) == {"question": "What, and why?", "answer": "So."}
    copy, count = write_without(file, {1})
    assert (copy.read_bytes(), count) == (b"question;answer\r\nWhat, and why?;So.\r\n", 1)
