"""Summary of an evaluation for `evaluation.json`: scores, counts and confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_llava.evaluation.answer_metrics import EXACT, METRICS
from lora_llava.evaluation.answers import is_answer_table
from lora_llava.evaluation.parsing.intervals import share_interval
from lora_llava.evaluation.scienceqa import COLUMNS


def summarise(table: Mapping[str, Any], scored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise a table with counts, 95% intervals, unparsed answers and unopened images.

    Args:
        table: A table of ScienceQA or of free answers.
        scored: The lines of its predictions file.

    Returns:
        `table`, with None for a score of no questions; for ScienceQA `unparsed` with its share in %; `unopened_images`,
        the ids of questions that count as wrong because an image could not be opened.
    """
    bad = [row["question_id"] for row in scored if "problem" in row]
    if is_answer_table(dict(table)):
        groups = {name: _known(scores) | _intervals(scores) for name, scores in table.items()}
        return {"table": groups, "unopened_images": bad}
    columns = {
        column: {
            "percent": percent if count else None,
            "correct": correct,
            "count": count,
            "interval": _rounded(correct, count),
        }
        for column in COLUMNS
        for percent, correct, count in [table[column]]
    }
    return {"table": columns, "unparsed": unparsed(table), "unopened_images": bad}


def unparsed(table: Mapping[str, Any]) -> dict[str, float]:
    """Return how many answers of a ScienceQA table named no choice, and their share in %."""
    count = table["AVG"][2]
    return {"count": table["unparsed"], "percent": round(100 * table["unparsed"] / max(1, count), 2)}


def _known(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores of a group, None in place of the scores of no questions."""
    return {name: value if scores["questions"] or name == "questions" else None for name, value in scores.items()}


def table_intervals(table: Mapping[str, Any]) -> dict[str, list[float] | None]:
    """Return the 95% interval of exact match by group of a table of free answers; None for a group of no questions."""
    return {group: _rounded(right_answers(scores), scores["questions"]) for group, scores in table.items()}


def right_answers(scores: Mapping[str, Any]) -> int:
    """Return the number of right answers of a group of free answers."""
    return round(scores[METRICS[EXACT].saved_as] * scores["questions"] / 100)


def _intervals(scores: Mapping[str, Any]) -> dict[str, list[float] | None]:
    """Return the 95% interval of each metric whose values are true or false."""
    count = scores["questions"]
    return {
        f"{metric.saved_as}_interval": _rounded(round(scores[metric.saved_as] * count / 100), count)
        for metric in METRICS.values()
        if metric.binary
    }


def _rounded(correct: int, count: int) -> list[float] | None:
    return [round(end, 2) for end in share_interval(correct, count)] if count else None
