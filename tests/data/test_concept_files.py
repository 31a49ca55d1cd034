"""The concept filter on files, by the command: forms in and out, nothing half written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.data.concepts.concept_files import caption_of, filter_caption_file
from lora_llava.data.concepts.noun_phrases import load_noun_phrases

CAPTIONS = ["a red dog on a table", "a red dog", "a red dog in a house", "an old castle", "", "a table", "a table"]
KEPT = ["a red dog on a table", "a red dog", "a red dog in a house", "a table", "a table"]


def rows() -> list[dict[str, Any]]:
    return [{"id": str(n), "image": f"{n}.jpg", "caption": caption} for n, caption in enumerate(CAPTIONS)]


def chat(caption: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": caption}]}


def run(source: Path, target: Path, *options: str) -> int:
    return main(None, ["filter-captions", str(source), "--output", str(target), "--tagger", "light", *options])


def test_a_list_goes_in_and_a_list_comes_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "a.json", tmp_path / "deep" / "b.json"
    source.write_text(json.dumps(rows()))
    assert run(source, target) == 0
    assert json.loads(target.read_text()) == [row for row in rows() if row["caption"] in KEPT]
    reported = capsys.readouterr().out
    assert "noun phrases found by the light tagger" in reported
    assert "5 of 7 rows; left out: 1 empty caption, 1 rare phrases only" in reported.replace("\n", " ")


def test_tables_and_llava_s_conversations_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url,text\n" + "".join(f"u{n},{text}\n" for n, text in enumerate(CAPTIONS)))
    assert run(tmp_path / "a.csv", tmp_path / "b.jsonl", "--caption-column", "text") == 0
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == KEPT
    (tmp_path / "chat.json").write_text(json.dumps([chat(text) for text in CAPTIONS]))
    assert run(tmp_path / "chat.json", tmp_path / "c.json") == 0
    assert json.loads((tmp_path / "c.json").read_text()) == [chat(text) for text in KEPT]


def test_nothing_chosen_is_an_empty_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(rows()))
    assert run(tmp_path / "a.json", tmp_path / "b.json", "--minimum", "50") == 0
    assert json.loads((tmp_path / "b.json").read_text()) == []


def test_captions_are_found_or_named() -> None:
    assert caption_of({"caption": "x", **chat("y")}) == "x"
    assert caption_of(chat("y")) == "y"
    with pytest.raises(UserError, match=r"row 1 has no caption and no conversation of one answer; it has id, text"):
        caption_of({"id": 1, "text": "z"})


def test_errors_are_reported_and_leave_no_file(tmp_path: Path) -> None:
    source = tmp_path / "a.json"
    source.write_text(json.dumps([*rows(), {"id": "x"}]))
    phrases = load_noun_phrases("light")
    (tmp_path / "there.json").write_text("mine")
    for target, message in (
        (tmp_path / "b.json", "row x has no caption"),
        (tmp_path / "b.txt", r"should be called \.json or \.jsonl"),
        (tmp_path / "there.json", "is there already"),
    ):
        with pytest.raises(UserError, match=message):
            filter_caption_file(source, target, noun_phrases=phrases)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "there.json"]
    assert (tmp_path / "there.json").read_text() == "mine"


@pytest.mark.slow
def test_ctrl_c_leaves_no_half_file(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("w") as stream:
        for number in range(300_000):
            stream.write(json.dumps({"caption": f"a red dog number {number % 977} on an old table"}) + "\n")
    command = [
        sys.executable,
        "-m",
        "lora_llava.commands.main",
        "filter-captions",
        str(tmp_path / "a.jsonl"),
        "--tagger",
        "light",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, "--output", str(tmp_path / "b.json")], **pipes)
    assert process.stdout is not None
    assert "noun phrases found by the light tagger" in process.stdout.readline()
    time.sleep(1)  # in the middle of the captions
    process.send_signal(signal.SIGINT)
    _, reported = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in reported
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
