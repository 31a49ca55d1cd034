"""Rows of a table with a question and its answer, and an image or none."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar

from lora_llava.core.errors import UserError
from lora_llava.data.formats.shared import Columns, Detected, RowFormat, Sample, cell_text


class QuestionTable(RowFormat):
    """`{"id", "image", "question", "answer"}`."""

    precedence = 30
    summary = "a table of image, question, answer"
    choices = ("conversations", "captions")
    aliases: ClassVar = {
        "question": ("question", "prompt", "instruction", "query", "user", "input", "q"),
        "answer": ("answer", "response", "output", "reply", "assistant", "completion", "target", "label", "a"),
    }

    def needs(self, columns: Columns) -> tuple[str, ...]:
        return columns.question, columns.answer

    def messages(self, row: Mapping[str, Any], match: str, columns: Columns, rng: random.Random) -> list[Any]:
        question, answer = cell_text(row, columns.question), cell_text(row, columns.answer)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def detect(self, sample: Sample) -> Detected | None:
        if "instruction" in sample.row and sample.row.get("input"):
            raise UserError(
                f"{sample.file}: its rows have instruction and input; join the two into one column question"
            )
        image, question, answer = (sample.roles.get(role) for role in ("image", "question", "answer"))
        if not question or not answer:
            return None
        names = ", ".join(filter(None, (image, question, answer)))
        return Detected("conversations", f"a table of {names}", sample.columns())


FORMAT = QuestionTable()
