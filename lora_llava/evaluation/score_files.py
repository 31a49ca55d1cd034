"""`lora-llava score scienceqa`: score a file of answers from any source."""

from __future__ import annotations

import json
from pathlib import Path

from lora_llava.core.errors import UserError
from lora_llava.data.scienceqa import question_of, read_problems
from lora_llava.evaluation.scienceqa import Table, make_prediction, score


def score_scienceqa_file(
    problems: Path, splits: Path, answers: Path, split: str = "test", parser: str = "llava"
) -> Table:
    """Score answers in the format that LLaVA publishes.

    Args:
        problems: `problems.json`.
        splits: `pid_splits.json`.
        answers: JSONL of `{"question_id", "text"}`.
        split: The evaluated split; a question without an answer is an error.
        parser: Parser of the letters, a member of `PARSERS`.

    Returns:
        The table.

    Raises:
        UserError: If a file is missing or malformed, or a question is unknown or has no answer.
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
        lacking = [field for field in ("subject", "grade") if field not in entry]
        if lacking:
            raise UserError(f"{problems}: row {pid}: the field {lacking[0]!r} is missing; the table needs it")
        predictions.append(make_prediction(pid, texts[pid], question_of(pid, entry), parser=parser))
    if not predictions:
        raise UserError(f"{splits}: split {split!r} is empty; name the evaluated one with --split")
    return score(predictions, parser)


def _read_answers(file: Path) -> dict[str, str]:
    if not file.is_file():
        raise UserError(f"{file} is missing; name a JSONL file of question_id and text")
    texts: dict[str, str] = {}
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines would split an answer at U+2028
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pid, text = str(row["question_id"]), row["text"]
            if not isinstance(text, str):
                raise TypeError(f"text is {text!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}, line {number}: needs question_id and text ({error})") from None
        if pid in texts:
            raise UserError(f"{file}, line {number}: question_id {pid!r} appears twice; keep one")
        texts[pid] = text
    return texts
