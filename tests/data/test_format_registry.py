"""The reader, the detection and the recipe's choices all follow from the table of row formats."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lora_llava.data import Turn
from lora_llava.data.folder import understand_folder
from lora_llava.data.formats import CHOICES, FORMATS, describe_choices, read_row, registry
from lora_llava.data.formats.shared import Columns, Detected, RowFormat, Sample
from lora_llava.recipe import DataSection, json_schema


class Riddles(RowFormat):
    """`{"riddle", "solution"}`."""

    precedence = 35
    summary = "a table of riddles"
    choices = ("conversations",)

    def needs(self, columns: Columns) -> tuple[str, ...]:
        return "riddle", "solution"

    def messages(self, row: Mapping[str, Any], match: str, columns: Columns, rng: random.Random) -> list[Any]:
        return [{"role": "user", "content": row["riddle"]}, {"role": "assistant", "content": row["solution"]}]

    def detect(self, sample: Sample) -> Detected | None:
        return Detected("conversations", "riddles", sample.columns()) if "riddle" in sample.row else None


def test_a_format_in_the_table_is_read_and_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = tuple(sorted((*FORMATS, Riddles()), key=lambda each: each.precedence))
    monkeypatch.setattr(registry, "FORMATS", formats)
    monkeypatch.setattr("lora_llava.data.table_shape.FORMATS", formats)
    row = {"riddle": "What has teeth and cannot bite?", "solution": "A comb."}
    assert read_row(row, 0).turns == (Turn("user", row["riddle"]), Turn("assistant", row["solution"]))
    (tmp_path / "rows.csv").write_text("riddle,solution\nWhat?,That.\n")
    assert understand_folder(tmp_path).shape == "riddles"
    assert "a table of riddles" in describe_choices()


def test_the_formats_are_found_in_their_order() -> None:
    names = [type(each).__name__ for each in FORMATS]
    assert names == ["Conversations", "Messages", "QuestionTable", "Captions"]


def test_the_recipe_has_the_choices_of_the_table() -> None:
    assert CHOICES == ("conversations", "captions", "scienceqa")
    assert DataSection.model_json_schema()["properties"]["format"]["enum"] == list(CHOICES)
    assert all(each.summary in json_schema() for each in FORMATS)
    with pytest.raises(ValueError, match="'conversations', 'captions' or 'scienceqa'"):
        DataSection.model_validate({"format": "riddles", "path": "a.csv"})
