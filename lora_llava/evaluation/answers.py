"""Records and tables of free answers: a line for each answer, and scores by source and by type of question."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_llava.evaluation.answer_metrics import group_scores, text_scores
from lora_llava.evaluation.parsing.normal import is_number, normalise

COMPARED_BY = "SQuAD's rule, numbers by their value, CJK by characters: lora_llava.evaluation.parsing.normal"
"""How free answers are compared with their references, as `evaluation.json` records it."""
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_PHRASE = 5
"""Most words of a short answer, as in the longest common answers of VQA v2."""
TYPES = ("yes/no", "number", "phrase", "text")
"""Types of question, by the reference answer, for data that names none. The first two are VQA's (arXiv 1505.00468,
section 4)."""

AnsweredRow = dict[str, Any]
"""One line of a predictions file: the texts `question_id`, `source`, `type`, `question`, `reference` and `text`; the
values of `METRICS`; `loss_tokens` beside a loss; `problem` if no answer could be made."""
AnswerTable = dict[str, dict[str, Any]]
"""Scores (see `group_scores`) by group: `all`; each source, if there are several; `type: yes/no` and so on, if there
are several types."""


def question_type(reference: str) -> str:
    """Return the type of a question, by its answer.

    Returns:
        One of `TYPES`: yes or no; a number in digits, or a word up to twelve; up to five words; more.
    """
    words = normalise(reference).split()
    if words and words[0] in ("yes", "no") and len(words) == 1:
        return "yes/no"
    if len(words) == 1 and (words[0] in _NUMBERS or is_number(words[0])):
        return "number"
    return "phrase" if len(words) <= _PHRASE else "text"


def score_answer(
    row_id: str, source: str, question: str, reference: str, text: str, kind: str | None = None
) -> AnsweredRow:
    """Score one answer.

    Args:
        row_id: Id of the row.
        source: Name of the row's source.
        question: The last question, without placeholder.
        reference: The answer in the data.
        text: The answer of the model.
        kind: The type of question, if the data names one; None uses `question_type`.

    Returns:
        A line of the predictions file.
    """
    about = {
        "question_id": row_id,
        "source": source,
        "type": kind or question_type(reference),
        "question": question,
        "reference": reference,
        "text": text,
    }
    return about | text_scores(text, reference)


def answer_table(rows: Iterable[AnsweredRow]) -> AnswerTable:
    """Average the scores over all rows, over each source and over each type of question.

    Args:
        rows: From `score_answer`.

    Returns:
        The table. The loss of a group is the mean over its tokens, and None if a row of the group has none.
    """
    rows = list(rows)
    table = {"all": group_scores(rows)}
    sources = list(dict.fromkeys(row["source"] for row in rows))
    for source in sources if len(sources) > 1 else []:
        name = f"{source} (source)" if source == "all" or source.startswith("type: ") else source
        table[name] = group_scores([row for row in rows if row["source"] == source])
    types = dict.fromkeys(row["type"] for row in rows)
    types = dict.fromkeys([*(kind for kind in TYPES if kind in types), *types])
    for kind in types if len(types) > 1 else []:
        table[f"type: {kind}"] = group_scores([row for row in rows if row["type"] == kind])
    return table


def is_answer_table(table: dict[str, Any] | None) -> bool:
    """Check whether a table is one of free answers, not ScienceQA's."""
    return bool(table) and "all" in (table or {})
