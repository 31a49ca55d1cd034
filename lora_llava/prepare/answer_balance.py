"""The balance of answers in the training rows: how often each is given, and where one is given almost always."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich.text import Text

from lora_llava.data.checks.findings import CheckReport, Finding
from lora_llava.data.conversation import Conversation
from lora_llava.data.folder_kinds.folder_kind import number_of
from lora_llava.evaluation.figures.majority import MOST_ROWS, AnswerCount, MajorityAnswers, count_row_answers
from lora_llava.evaluation.row_evaluation import choose_rows
from lora_llava.splits.encoded_sources import OpenSplit

ONE_ANSWER = "one answer"
_ALMOST_ALL = 0.8
"""Share of rows with one answer above which it is a warning."""
_LEAST = 20
"""Rows that a group needs for a warning."""
_GROUPS, _ANSWERS, _LETTERS = 8, 4, 24
"""Most groups, answers of a group, and letters of a text that are printed."""


def train_answers(split: OpenSplit, seed: int) -> MajorityAnswers | None:
    """Count the last answers of the training rows that could be read, at most `MOST_ROWS`, drawn by the seed.

    Args:
        split: The training split.
        seed: Seed of the draw.
    """

    def read() -> Iterator[Conversation]:
        for number, (source, table) in enumerate(zip(split.sources, split.tables, strict=True)):
            mine = split.places[split.places[:, 0] == number, 1]
            sound = mine[~np.isin(mine, table.problems.where())].tolist()
            yield from source.pick(sorted(choose_rows(sound, MOST_ROWS, seed)))

    return count_row_answers(row for row in read() if len(row.turns) > 1)


def add_balance(report: CheckReport, counts: MajorityAnswers | None) -> None:
    """Add the counts to the report, and a warning for each group in which one answer is given almost always."""
    if counts is None:
        return
    report.splits.get("train", {})["answers"] = counts.as_dict()
    for group in counts.groups if counts.all.share <= _ALMOST_ALL else [counts.all]:
        if group.share > _ALMOST_ALL and group.rows >= _LEAST:
            about = f" of {group.title!r}" if group.by != "all" else ""
            every = "all" if group.distinct == 1 else f"{100 * group.share:.0f}%"
            report.warnings.append(
                Finding(
                    ONE_ANSWER,
                    "",
                    f"{every} of the {group.rows:,} rows{about} have the answer {_short(group.majority)!r}: a model "
                    "that always gives it scores as high; add rows with other answers",
                    -1,
                    "",
                    "train",
                )
            )


def balance_lines(counts: MajorityAnswers | None) -> list[Text]:
    """Return a line for each group of training rows: rows, and the most frequent answers with their shares."""
    if counts is None or not counts.exists:
        return []
    groups = counts.groups
    lines = [_line(group) for group in groups[:_GROUPS]]
    if len(groups) > _GROUPS:
        rest = groups[_GROUPS:]
        lines.append(Text(f"  {len(rest):,} more questions, {sum(group.rows for group in rest):,} rows"))
    return [Text("answers of the training rows:"), *lines]


def _line(group: AnswerCount) -> Text:
    title = _short(group.title, 2 * _LETTERS)
    rows = number_of(group.rows, "row")
    if 2 * group.distinct > group.rows:
        return Text(f"  {title}: {rows}, {number_of(group.distinct, 'different answer')}")
    shown = _most(group.answers)
    left = group.distinct - len(shown)
    more = f", {left:,} other answer{'s' * (left != 1)}" if left else ""
    named = ", ".join(f"{_short(answer)} {100 * count / group.rows:.0f}%" for answer, count in shown)
    return Text(f"  {title}: {rows}; {named}{more}")


def _most(answers: Sequence[tuple[str, int]]) -> Sequence[tuple[str, int]]:
    return answers[:_ANSWERS] if len(answers) != _ANSWERS + 1 else answers


def _short(text: str, letters: int = _LETTERS) -> str:
    text = " ".join(text.split())
    return text if len(text) <= letters else text[: letters - 1] + "…"
