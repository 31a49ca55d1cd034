"""`lora-llava score scienceqa`: marks a file of answers, whoever wrote it."""

from __future__ import annotations

import json
from pathlib import Path

from lora_llava.data.scienceqa import read_problems
from lora_llava.errors import UserError
from lora_llava.evaluation.scienceqa import Table, make_prediction, score


def score_scienceqa_file(problems: Path, splits: Path, answers: Path, split: str = "test") -> Table:
    """Score answers in the form that LLaVA publishes.

    Args:
        problems: `problems.json`.
        splits: `pid_splits.json`.
        answers: JSONL of `{"question_id", "text"}`.
        split: The split that was asked; a question without answer is an error.

    Returns:
        The table.

    Raises:
        UserError: For a file that is missing or malformed, an unknown question, or one that has no answer.
    """
    entries = read_problems(problems, splits, split)
    texts = _read_answers(answers)
    unknown = [pid for pid in texts if pid not in entries]
    if unknown:
        raise UserError(f"{answers}: question_id {unknown[0]!r} is not in split {split!r} of {splits}")
    missing = [pid for pid in entries if pid not in texts]
    if missing:
        raise UserError(f"{answers}: no answer to {len(missing)} of {len(entries)} questions, the first {missing[0]!r}")
    predictions = []
    for pid, entry in entries.items():
        question = {
            "answer": entry["answer"], "num_choices": len(entry["choices"]), "subject": entry["subject"],
            "grade": entry["grade"], "has_image": bool(entry.get("image")), "has_hint": bool(entry.get("hint")),
        }  # fmt: skip
        predictions.append(make_prediction(pid, texts[pid], question))
    return score(predictions)


def _read_answers(file: Path) -> dict[str, str]:
    if not file.is_file():
        raise UserError(f"{file} is missing; give a JSONL file of question_id and text")
    texts: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pid, text = str(row["question_id"]), str(row["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}, line {number}: needs question_id and text ({error})") from None
        if pid in texts:
            raise UserError(f"{file}, line {number}: question_id {pid!r} was answered before; keep one")
        texts[pid] = text
    return texts
