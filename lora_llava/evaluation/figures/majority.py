"""The majority answer: what a person would score who always gives the most frequent answer of the training rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_llava.data.conversation import Conversation
from lora_llava.evaluation.answers import AnsweredRow, score_answer
from lora_llava.evaluation.parsing.normal import normalise
from lora_llava.runs.directory import METRICS_FILE, is_run

FEW = 20
"""Most different answers of questions that count as having few answers."""
ENOUGH = 5
"""Rows per different answer, on average, that such questions need, and rows of a question that counts by itself."""
_MOST_QUESTIONS = 200
"""Most questions that are counted by themselves, the most frequent first."""
MOST_ROWS = 50_000
"""Most training rows that are counted, drawn by the seed."""


@dataclass(frozen=True)
class AnswerCount:
    """The answers of a group of rows.

    Attributes:
        by: What the rows of the group share: `type`, `question`, or `all` for a group of all rows.
        name: The type, or the question as its first row has it; "" for all rows.
        rows: Number of rows.
        distinct: Number of different answers.
        answers: Up to `FEW` answers with their counts, the most frequent first. Each is written in its most frequent
            form. Answers that exact match does not distinguish, such as "Yes." and "yes", are one.
    """

    by: str
    name: str
    rows: int
    distinct: int
    answers: tuple[tuple[str, int], ...]

    @property
    def majority(self) -> str:
        """The most frequent answer; of equally frequent ones, the first in the data."""
        return self.answers[0][0]

    @property
    def share(self) -> float:
        """The share of rows with the majority answer, from 0 to 1."""
        return self.answers[0][1] / self.rows

    @property
    def few(self) -> bool:
        """Whether there are few different answers, with enough rows for each."""
        return self.distinct <= FEW and self.rows >= ENOUGH * self.distinct

    @property
    def title(self) -> str:
        """Its name in a table."""
        return {"type": f"type: {self.name}", "question": self.name}.get(self.by, "all")


@dataclass
class _Counter:
    """Counts answers by what exact match compares, and the forms in which each is written."""

    answers: Counter[str] = field(default_factory=Counter)
    forms: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, answer: str) -> None:
        same = normalise(answer)
        self.answers[same] += 1
        self.forms.setdefault(same, Counter())[answer.strip()] += 1

    def counted(self, by: str, name: str) -> AnswerCount:
        found = tuple((self.forms[same].most_common(1)[0][0], n) for same, n in self.answers.most_common(FEW))
        return AnswerCount(by, name, self.answers.total(), len(self.answers), found)


@dataclass(frozen=True)
class MajorityAnswers:
    """The most frequent answers of the training rows, by type of question.

    A row whose data names a type belongs to its type. Any other row belongs to its question, if that is asked often
    enough (`ENOUGH`), or else to all rows.

    Attributes:
        all: All rows.
        types: By the type that the data names.
        questions: By the normalised question.
    """

    all: AnswerCount
    types: Mapping[str, AnswerCount]
    questions: Mapping[str, AnswerCount]

    def group(self, kind: str | None, question: str) -> AnswerCount:
        """Return the group that a held-out row belongs to; all rows if its type or question was not trained on."""
        if kind and kind.strip() in self.types:
            return self.types[kind.strip()]
        return self.questions.get(normalise(question), self.all)

    @property
    def groups(self) -> list[AnswerCount]:
        """The types and questions, most rows first; if there is none, all rows."""
        return sorted([*self.types.values(), *self.questions.values()], key=lambda group: -group.rows) or [self.all]

    @property
    def exists(self) -> bool:
        """Whether any answer occurs twice."""
        return self.all.answers[0][1] > 1

    def as_dict(self) -> dict[str, Any]:
        """Return it for a JSON file."""
        return {
            "all": asdict(self.all),
            "types": [asdict(group) for group in self.types.values()],
            "questions": [asdict(group) for group in self.questions.values()],
        }


def read_majority(saved: Mapping[str, Any]) -> MajorityAnswers:
    """Return what `MajorityAnswers.as_dict` saved.

    Raises:
        KeyError: If a key is missing; TypeError or ValueError if a value is of another kind.
    """

    def group(content: Mapping[str, Any]) -> AnswerCount:
        answers = tuple((str(answer), int(count)) for answer, count in content["answers"])
        return AnswerCount(content["by"], content["name"], content["rows"], content["distinct"], answers)

    types, questions = (list(map(group, saved[name])) for name in ("types", "questions"))
    return MajorityAnswers(
        group(saved["all"]), {each.name: each for each in types}, {normalise(each.name): each for each in questions}
    )


def saved_majority(folder: Path) -> MajorityAnswers | None:
    """Return the counts that a run has saved; None for another folder, or a run of an earlier version."""
    file = folder / METRICS_FILE
    if not is_run(folder) or not file.is_file():
        return None
    try:
        return read_majority(json.loads(file.read_text(encoding="utf-8"))["figures"]["majority"])
    except (ValueError, TypeError, KeyError, IndexError):
        return None


def count_answers(rows: Iterable[tuple[str | None, str, str]]) -> MajorityAnswers | None:
    """Count the answers of rows.

    Args:
        rows: Type (None or blank if the data names none), question and answer of each row.

    Returns:
        The counts; None without rows.
    """
    everything = _Counter()
    types: dict[str, _Counter] = {}
    questions: dict[str, _Counter] = {}
    names: dict[str, str] = {}
    for kind, question, answer in rows:
        everything.add(answer)
        if kind and kind.strip():
            types.setdefault(kind.strip(), _Counter()).add(answer)
        else:
            same = normalise(question)
            names.setdefault(same, question.strip())
            questions.setdefault(same, _Counter()).add(answer)
    if not everything.answers:
        return None
    often = [same for same, found in questions.items() if found.answers.total() >= ENOUGH]
    often = sorted(often, key=lambda same: -questions[same].answers.total())[:_MOST_QUESTIONS]
    return MajorityAnswers(
        everything.counted("all", ""),
        {name: found.counted("type", name) for name, found in types.items()},
        {same: questions[same].counted("question", names[same]) for same in often},
    )


def count_row_answers(rows: Iterable[Conversation]) -> MajorityAnswers | None:
    """Count the last answers of conversations; see `count_answers`."""
    return count_answers((row.extra.get("type"), row.turns[-2].words, row.turns[-1].shown) for row in rows)


def majority_rows(majority: MajorityAnswers, rows: Sequence[AnsweredRow], named: Sequence[str | None]) -> list[Any]:
    """Score the majority answers on held-out rows, by the same metrics as a model's answers.

    Args:
        majority: From the training rows.
        rows: Lines of a predictions file.
        named: The type that the data names for each row; None if it names none.

    Returns:
        Lines as a predictions file has them, without loss.
    """
    return [
        score_answer(
            row["question_id"],
            row.get("source", ""),
            row["question"],
            row["reference"],
            majority.group(kind, row["question"]).majority,
            row.get("type"),
        )
        for row, kind in zip(rows, named, strict=True)
    ]
