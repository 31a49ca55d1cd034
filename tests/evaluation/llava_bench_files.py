"""Small files in the format of LLaVA-Bench."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

QUESTION = {"question_id": 0, "image": "1.jpg", "text": "What is it?", "category": "conv"}
CATEGORIES = ("conv", "detail", "complex")


def write(file: Path, rows: Iterable[Any]) -> Path:
    """Write JSONL."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def bench(folder: Path, count: int = 3) -> dict[str, Path]:
    """Four files of so many questions, by the name of the option that takes them."""
    questions = [
        QUESTION | {"question_id": i, "category": CATEGORIES[i % 3], "text": f"What is in {i}?"} for i in range(count)
    ]
    return {
        "questions": write(folder / "questions.jsonl", questions),
        "context": write(folder / "context.jsonl", [{"image": "1.jpg", "caption": "A dog."}]),
        "reference": write(folder / "reference.jsonl", [{"question_id": i, "text": f"gpt {i}"} for i in range(count)]),
        "answers": write(folder / "answers.jsonl", [{"question_id": i, "text": f"ours {i}"} for i in range(count)]),
    }


def options(files: dict[str, Path]) -> list[str]:
    """The files as arguments of the verb."""
    return [part for name, file in files.items() for part in (f"--{name}", str(file))]
