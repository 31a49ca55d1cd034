"""Confusion tables of questions with few answers: which answer was given in place of which, and recall by answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_llava.evaluation.answers import AnsweredRow
from lora_llava.evaluation.figures.majority import FEW
from lora_llava.evaluation.parsing.intervals import share_interval
from lora_llava.evaluation.parsing.normal import normalise

OTHER = "any other answer"
"""The last column: answers that no reference of the table has."""
_ROWS_EACH = 3
"""Held-out rows per different reference, on average, that a table needs."""
_MOST_TABLES = 8
"""With more questions or types, their rows are grouped by the kind of reference, such as `number`."""


@dataclass(frozen=True)
class Confusion:
    """References against answers of one group of held-out rows.

    Attributes:
        group: Title of the group, such as `type: colour`; "" for all rows.
        answers: The different references, the most frequent first, each in its most frequent form.
        counts: For each reference, how often each of `answers` was given, and last how often any other answer.
        balanced_accuracy: The mean of the recalls, in %.
    """

    group: str
    answers: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    balanced_accuracy: float

    @property
    def rows(self) -> int:
        """Number of held-out rows."""
        return sum(map(sum, self.counts))

    @property
    def right(self) -> int:
        """Number of right answers."""
        return sum(counts[place] for place, counts in enumerate(self.counts))

    def recall(self, place: int) -> float:
        """Return the share of a reference's rows that were answered right, in %."""
        return 100 * self.counts[place][place] / sum(self.counts[place])

    def instead(self, place: int) -> list[tuple[str, int]]:
        """Return the wrong answers to a reference's rows with their counts, the most frequent first."""
        names = [*self.answers, OTHER]
        wrong = [(names[i], n) for i, n in enumerate(self.counts[place]) if n and i != place]
        return sorted(wrong, key=lambda found: -found[1])

    def as_dict(self) -> dict[str, Any]:
        """Return it for a JSON file, with rows, recall and its 95% interval by answer."""
        classes = {
            answer: {
                "rows": sum(counts),
                "recall": round(self.recall(place), 2),
                "recall_interval": [round(end, 2) for end in share_interval(counts[place], sum(counts))],
            }
            for place, (answer, counts) in enumerate(zip(self.answers, self.counts, strict=True))
        }
        return asdict(self) | {"classes": classes}


def read_confusion(saved: Mapping[str, Any]) -> Confusion:
    """Return what `Confusion.as_dict` saved.

    Raises:
        KeyError: If a key is missing; TypeError or ValueError if a value is of another kind.
    """
    counts = tuple(tuple(map(int, row)) for row in saved["counts"])
    return Confusion(saved["group"], tuple(saved["answers"]), counts, float(saved["balanced_accuracy"]))


def confusions(rows: Sequence[AnsweredRow], named: Sequence[str | None]) -> list[Confusion]:
    """Build a confusion table for each group of rows with few different references.

    Rows are grouped by the type that the data names; without one by question, if there are few questions; else by the
    kind of reference (`question_type`).

    Args:
        rows: Lines of a predictions file.
        named: The type that the data names for each row; None if it names none.
    """
    groups: dict[str, list[AnsweredRow]] = {}
    for title, row in zip(_titles(rows, named), rows, strict=True):
        groups.setdefault(title, []).append(row)
    if len(groups) == 1:
        groups = {"": list(rows)}
    return [build_confusion(title, mine) for title, mine in groups.items() if _has_few(mine)]


def _titles(rows: Sequence[AnsweredRow], named: Sequence[str | None]) -> list[str]:
    if any(kind and kind.strip() for kind in named):
        return [f"type: {kind.strip() if kind and kind.strip() else row['type']}" for row, kind in _pairs(rows, named)]
    questions = [normalise(row["question"]) for row in rows]
    if len(set(questions)) <= _MOST_TABLES:
        first = {same: row["question"] for same, row in reversed(list(zip(questions, rows, strict=True)))}
        return [first[same] for same in questions]
    return [f"type: {row['type']}" if row.get("type") else "" for row in rows]


def _pairs(rows: Sequence[AnsweredRow], named: Sequence[str | None]) -> list[tuple[AnsweredRow, str | None]]:
    return list(zip(rows, named, strict=True))


def _has_few(rows: Sequence[AnsweredRow]) -> bool:
    distinct = len({normalise(row["reference"]) for row in rows})
    return distinct <= FEW and len(rows) >= _ROWS_EACH * distinct


def build_confusion(group: str, rows: Sequence[AnsweredRow]) -> Confusion:
    """Build the confusion table of a group of rows.

    Args:
        group: Its title.
        rows: Lines of a predictions file; at least one.
    """
    same = [normalise(row["reference"]) for row in rows]
    forms: dict[str, Counter[str]] = {}
    for reference, row in zip(same, rows, strict=True):
        forms.setdefault(reference, Counter())[row["reference"].strip()] += 1
    order = [reference for reference, _ in Counter(same).most_common()]
    places = {reference: place for place, reference in enumerate(order)}
    counts = [[0] * (len(order) + 1) for _ in order]
    for reference, row in zip(same, rows, strict=True):
        given = places.get(normalise(row["text"]), len(order)) if "problem" not in row else len(order)
        counts[places[reference]][given] += 1
    recalls = [each[place] / sum(each) for place, each in enumerate(counts)]
    return Confusion(
        group,
        tuple(forms[reference].most_common(1)[0][0] for reference in order),
        tuple(map(tuple, counts)),
        round(100 * sum(recalls) / len(recalls), 2),
    )
