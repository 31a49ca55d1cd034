"""Hostile files of rows: reported in one line with the place, or dropped and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.own_rows import asked
from tests.security.conftest import WriteRows
from tests.security.hostile import MEMORY_RISE_MIB, run_verb

GOOD = json.dumps(asked(0, "0.png"))
TWICE = '{"id": "a", "image": "0.png", "image": "../secret.png", "question": "Q?", "answer": "A."}'
DEEP = "[" * 100_000 + "]" * 100_000
NUMBER = '{"id": ' + "9" * 5000 + "}"
DIGITS = "Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits"

HOSTILE = {
    "deep.json": (f"[{GOOD}, {DEEP}]", ": not readable as JSON: it is nested too deeply"),
    "deep.jsonl": (f"{GOOD}\n{DEEP}\n", ": not readable as JSON: it is nested too deeply"),
    "deep_object.json": ('{"a":' * 100_000, ": not readable as JSON: it is nested too deeply"),
    "number.json": (f"[{GOOD},\n{NUMBER}]", f", line 2: {DIGITS}, after 1 complete rows"),
    "number.jsonl": (f"{GOOD}\n{NUMBER}\n", f", line 2: not JSON: {DIGITS}"),
    "twice.json": (
        f"[{GOOD},\n{TWICE}]",
        ", line 2: the key 'image' appears twice in one object; keep one, after 1 complete rows",
    ),
    "twice.jsonl": (f"{GOOD}\n{TWICE}\n", ", line 2: the key 'image' appears twice in one object; keep one"),
    "latin.json": (b'[{"id": "\xff"}]', ": not UTF-8: invalid start byte at byte 9; save it as UTF-8"),
    "object.json": (
        '{"rows": [1]}',
        ": it should be a list of rows, not dict; save only the list under rows",
    ),
    "pickle.parquet": (
        b"\x80\x04cos\nsystem\n(S'touch x'\ntR.",
        ": not a Parquet file: Parquet magic bytes not found in footer. Either the file is corrupted or this is not a "
        "parquet file.",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line(name: str, write_rows: WriteRows, tmp_path: Path) -> None:
    content, reported = HOSTILE[name]
    good = run_verb("finetune", write_rows(), "--dry-run")
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    recipe, report = write_rows(file=file, validation_rows=0), tmp_path / "report.json"
    found = run_verb("finetune", recipe, "--dry-run")
    assert (found.code, found.err) == (2, f"error: {file}{reported}\n")
    checked = run_verb("check", recipe, "--json", report)
    assert (checked.code, checked.err) == (1, "")
    assert [each["message"] for each in json.loads(report.read_text())["errors"]] == [f"{file}{reported}"]
    assert max(found.rise_mib, checked.rise_mib) - good.rise_mib < MEMORY_RISE_MIB


BAD_ROWS = [
    '{"id": "n", "conversations": [{"from": "human", "value": NaN}, {"from": "gpt", "value": "A."}]}',
    '{"id": "i", "conversations": [{"from": "human", "value": Infinity}, {"from": "gpt", "value": "A."}]}',
    '{"id": "d", "conversations": ' + "[" * 500 + "]" * 500 + "}",
    '{"id": "o", "conversations": {"from": "human"}}',
    '{"id": "m", "image": {"path": "/etc/passwd"}, "question": "Q?", "answer": "A."}',
    '{"id": "l", "image": [["0.png"]], "question": "Q?", "answer": "A."}',
    "NaN",
    "1e999",
    "null",
    '"text"',
    "[]",
    "{}",
]


def test_hostile_rows_are_dropped_and_counted(write_rows: WriteRows, tmp_path: Path) -> None:
    good = [json.dumps(asked(number, f"{number}.png")) for number in range(8)]
    file = tmp_path / "some.jsonl"
    file.write_text("\n".join([*good, *BAD_ROWS]) + "\n")
    report = tmp_path / "report.json"
    recipe = write_rows(file=file, validation_rows=0, on_bad_row="drop", on_bad_image="drop")
    assert run_verb("check", recipe, "--json", report).code == 0
    reported = json.loads(report.read_text())
    assert (reported["rows"], reported["errors"]) == (20, [])
    assert sum(each["dropped"] for each in reported["warnings"]) == 12
    found = run_verb("finetune", recipe, "--dry-run")
    assert found.code == 0, found.err
    assert "train │ 20 │ 8 │ 10 malformed row, 1 missing column, 1 bad image │" in " ".join(found.out.split())


LACKS, TOO_LONG = "it lacks conversations", "a row of more than 16,777,216 characters"
LONG = {
    "long.jsonl": ('{"id": "x"}', 15_000_000, LACKS),
    "long.json": ('[{"id": "x"}]', 15_000_000, LACKS),
    "long.csv": ("id\nx\n", 15_000_000, LACKS),
    "too_long.jsonl": (f'{GOOD}\n{{"id": "x"}}', 120_000_000, f"too_long.jsonl, line 2: {TOO_LONG}"),
    "too_long.json": (f'[{GOOD}, {{"id": "x"}}]', 120_000_000, f"too_long.json, line 1: {TOO_LONG}"),
    "too_long_object.json": ('{"rows": [{"id": "x"}]}', 120_000_000, "it should be a list of rows"),
    "header.csv": ("x\n1\n", 120_000_000, f"line 1: not a table: {TOO_LONG}"),
    "lines.json": ('{"id": 1}\n{"id": "x"}', 120_000_000, f"lines.json, line 2: {TOO_LONG}"),
    "too_long.csv": ("id\nx\n", 120_000_000, f"line 2: not a table: {TOO_LONG}"),
}
"""The content of a file, the length of its x, and the message."""


@pytest.mark.parametrize("name", LONG)
def test_a_long_row_is_reported_in_one_line(name: str, write_rows: WriteRows, tmp_path: Path) -> None:
    content, size, reported = LONG[name]
    file = tmp_path / name
    file.write_text(content.replace("x", "x" * size))
    found = run_verb("finetune", write_rows(file=file, validation_rows=0), "--dry-run")
    file.unlink()
    assert found.code == 2
    assert reported in found.err
    assert len(found.err) < 1000
    assert found.rise_mib < MEMORY_RISE_MIB
