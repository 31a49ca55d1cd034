"""Files of LLaVA-Bench as published: COCO (30 images, 90 questions) and In-the-Wild (24 images, 60 questions)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.evaluation.judge.review import CATEGORIES, JudgeCase

_PREFIX = "llava_bench_"
"""Prefix of the categories in In-the-Wild's reviews (llava/eval/eval_gpt_review_bench.py)."""


@dataclass(frozen=True)
class BenchQuestion:
    """One question of LLaVA-Bench.

    Attributes:
        question_id: Id of the question, a number as text.
        image: File name of the image.
        category: `conv`, `detail` or `complex`.
        text: Text of the question.
    """

    question_id: str
    image: str
    category: str
    text: str


def read_questions(file: Path) -> list[BenchQuestion]:
    """Read `qa90_questions.jsonl` or In-the-Wild's `questions.jsonl`.

    Args:
        file: JSONL of `question_id`, `image`, `category` and `text`.

    Returns:
        The questions, in the order of the file.

    Raises:
        UserError: If the file is missing, empty or malformed, a category is unknown, or an id appears twice.
    """
    questions: dict[str, BenchQuestion] = {}
    for where, row in _rows(file):
        question_id = _id(where, row)
        named = _text(where, row, "category")
        category = named.strip().lower().removeprefix(_PREFIX)
        if category not in CATEGORIES:
            raise UserError(f"{where}: category {named!r} is unknown; use one of {', '.join(CATEGORIES)}")
        _refuse_second(where, "question_id", question_id, questions)
        image, text = _text(where, row, "image"), _text(where, row, "text")
        questions[question_id] = BenchQuestion(question_id, image, category, text)
    return list(questions.values())


def read_contexts(file: Path) -> dict[str, str]:
    """Read the contexts of the images: captions and boxes for COCO, captions for In-the-Wild.

    Args:
        file: JSONL of `image` with `captions` and `instances` (`category`, `bbox` as x1, y1, x2, y2 from 0 to 1), or
            with `caption`.

    Returns:
        The text that the judge reads, by image.

    Raises:
        UserError: If the file is missing, empty or malformed, or an image appears twice.
    """
    contexts: dict[str, str] = {}
    for where, row in _rows(file):
        image = _text(where, row, "image")
        _refuse_second(where, "image", image, contexts)
        field = "captions" if "captions" in row else "caption"
        captions = row.get(field)
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
            raise UserError(f"{where}: {field} must be a text or a list of texts")
        parts = ["\n".join(["What people wrote about the image:", *(f"- {text.strip()}" for text in captions)])]
        if row.get("instances"):
            boxes = [_box(where, instance) for instance in row["instances"]]
            parts.append("\n".join([_BOXES, *boxes]))
        contexts[image] = "\n\n".join(parts)
    return contexts


_BOXES = (
    "Objects with the corners of their boxes, left, top, right, bottom, as fractions of the image's width and height:"
)


def _box(where: str, instance: Any) -> str:
    try:
        corners = ", ".join(f"{float(number):.3f}" for number in instance["bbox"])
        if len(instance["bbox"]) != 4:
            raise ValueError
        return f"- {instance['category']}: {corners}"
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where}: each of instances must have a category and a bbox of four numbers") from None


def read_answers(file: Path) -> dict[str, str]:
    """Read answers of GPT-4 or of a model.

    Args:
        file: JSONL of `question_id` and `text`.

    Returns:
        Texts by id of the question.

    Raises:
        UserError: If the file is missing, empty or malformed, or an id appears twice.
    """
    answers: dict[str, str] = {}
    for where, row in _rows(file):
        question_id = _id(where, row)
        _refuse_second(where, "question_id", question_id, answers)
        answers[question_id] = _text(where, row, "text", may_be_empty=True)
    return answers


def read_cases(questions: Path, contexts: Path, reference: Path, answers: Path) -> list[JudgeCase]:
    """Combine the four files into cases for the judge.

    Args:
        questions: File for `read_questions`.
        contexts: File for `read_contexts`.
        reference: File for `read_answers` with GPT-4's answers.
        answers: File for `read_answers` with the answers to judge.

    Returns:
        One case per question.

    Raises:
        UserError: As the readers, and if a question has no context or answer, or an answer has no question.
    """
    wanted = read_questions(questions)
    known = read_contexts(contexts)
    texts = {file: read_answers(file) for file in (reference, answers)}
    _refuse_missing(contexts, "context for image", [question.image for question in wanted], known)
    ids = [question.question_id for question in wanted]
    for file, found in texts.items():
        _refuse_missing(file, "answer to question_id", ids, found)
        unknown = [question_id for question_id in found if question_id not in set(ids)]
        if unknown:
            raise UserError(f"{file}: {_some('question_id', unknown)} not in {questions}; name its answers")
    measure, judged = texts[reference], texts[answers]
    return [
        JudgeCase(row.question_id, row.category, row.text, known[row.image], measure[row.question_id], text)
        for row, text in zip(wanted, map(judged.__getitem__, ids), strict=True)
    ]


def _refuse_missing(file: Path, what: str, wanted: Sequence[str], found: Mapping[str, Any]) -> None:
    missing = [name for name in dict.fromkeys(wanted) if name not in found]
    if missing:
        raise UserError(f"{file}: {len(missing)} missing: {_some(what, missing)}")


def _some(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(map(repr, names[:3]))}{more}"


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with its file and line."""
    if not file.is_file():
        raise UserError(f"{file} is missing; name one of LLaVA-Bench's JSONL files")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines would split a text at U+2028
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{file}, line {number}: not JSON; write one object per line") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}: {type(row).__name__}, not an object")
        yield f"{file}, line {number}", row
    if not any(line.strip() for line in lines):
        raise UserError(f"{file} is empty; name one of LLaVA-Bench's JSONL files")


def _id(where: str, row: Mapping[str, Any]) -> str:
    value = row.get("question_id")
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise UserError(f"{where}: question_id is {value!r}; it must be a number or a name")
    return str(value)


def _text(where: str, row: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        raise UserError(f"{where}: {name} is {value!r}; it must be a text")
    return value


def _refuse_second(where: str, name: str, value: str, seen: Mapping[str, Any]) -> None:
    if value in seen:
        raise UserError(f"{where}: {name} {value!r} appears twice; keep one")
