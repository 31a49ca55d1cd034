"""Marks for free answers: exact match and token F1, as SQuAD defines them (arXiv 1606.05250, section 6.1)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable
from typing import Any, TypedDict

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

AnswerTable = dict[str, list[float]]
"""`{source: [exact match in %, F1 in %, questions]}`, `all` first."""


class AnsweredRow(TypedDict):
    """One line of a predictions file."""

    question_id: str
    source: str
    question: str
    reference: str
    text: str
    exact: bool
    f1: float


def normalise(text: str) -> str:
    """Lower case, without articles, punctuation and doubled spaces; a text of articles alone, such as the choice A,
    keeps them."""
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split()) or " ".join(plain.split())


def exact_match(text: str, reference: str) -> bool:
    """Whether an answer says what the reference says."""
    return normalise(text) == normalise(reference)


def token_f1(text: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words.

    Returns:
        From 0 to 1; of two texts without words, 1.
    """
    ours, theirs = normalise(text).split(), normalise(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def mark_answer(row_id: str, source: str, question: str, reference: str, text: str) -> AnsweredRow:
    """Mark one answer.

    Args:
        row_id: The row's.
        source: The row's source.
        question: The last question, without placeholder.
        reference: What the data answers.
        text: What the model wrote.
    """
    return AnsweredRow(
        question_id=row_id, source=source, question=question, reference=reference, text=text,
        exact=exact_match(text, reference), f1=token_f1(text, reference),
    )  # fmt: skip


def answer_table(rows: Iterable[AnsweredRow]) -> AnswerTable:
    """Average marks over all rows and over each source."""
    groups: dict[str, list[AnsweredRow]] = {"all": []}
    for row in rows:
        groups["all"].append(row)
        name = "all (source)" if row["source"] == "all" else row["source"]
        groups.setdefault(name, []).append(row)
    if len(groups) == 2:
        del groups[next(name for name in groups if name != "all")]  # one source is all
    return {
        name: [
            round(100 * sum(row["exact"] for row in mine) / max(1, len(mine)), 2),
            round(100 * sum(row["f1"] for row in mine) / max(1, len(mine)), 2),
            len(mine),
        ]
        for name, mine in groups.items()
    }


def is_answer_table(table: dict[str, Any] | None) -> bool:
    """Whether a table is of free answers and not ScienceQA's."""
    return bool(table) and "all" in (table or {})
