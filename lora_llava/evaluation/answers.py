"""Marks for free answers: exact match and token F1 as SQuAD defines them (arXiv 1606.05250, section 6.1), ROUGE-L.

What is compared are the tokens of `lora_llava.evaluation.parsing.normal`, whose docstring states the rule.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NotRequired, TypedDict

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from lora_llava.evaluation.parsing.normal import CJK, answer_tokens, is_number, normalise

MARKING = "SQuAD's rule, numbers by their value, CJK by characters: lora_llava.evaluation.parsing.normal"
"""How free answers are compared."""
_WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_PHRASE = 5
"""Words of a short answer; VQA v2's longest common ones have as many."""
TYPES = ("yes/no", "number", "phrase", "text")
"""Kinds of question, by what the data answers, where it names none itself; the first two are VQA's (arXiv 1505.00468,
section 4)."""


class AnsweredRow(TypedDict):
    """One line of a predictions file."""

    question_id: str
    source: str
    type: str
    question: str
    reference: str
    text: str
    exact: bool
    f1: float
    rouge_l: float
    loss: NotRequired[float]
    loss_tokens: NotRequired[int]
    problem: NotRequired[str]


class Marks(TypedDict):
    """What a group of questions gets: three shares in %, the loss in nats a token, how many questions."""

    exact_match: float
    f1: float
    rouge_l: float
    loss: float | None
    questions: int


AnswerTable = dict[str, Marks]
"""By group: `all`; the sources, where there are several; `type: yes/no` and so on, where there are several types."""


class _Words(Tokenizer):
    """rouge_score's own tokenizer knows no letter beyond a to z; this one agrees with it on those, and takes CJK by
    characters."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


_ROUGE = RougeScorer(["rougeL"], tokenizer=_Words())


def exact_match(text: str, reference: str) -> bool:
    """Whether an answer says what the reference says, by the tokens of both."""
    return answer_tokens(text) == answer_tokens(reference)


def token_f1(text: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, numbers and CJK characters.

    Returns:
        From 0 to 1; of two texts without words, 1.
    """
    ours, theirs = answer_tokens(text), answer_tokens(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def rouge_l(text: str, reference: str) -> float:
    """F-measure over the longest common subsequence of words (Lin 2004), by rouge_score, without stemming.

    Returns:
        From 0 to 1; 0 where either has no word.
    """
    return float(_ROUGE.score(reference, text)["rougeL"].fmeasure)


def question_type(reference: str) -> str:
    """The kind of question that has this answer.

    Returns:
        One of `TYPES`: yes or no; a number in digits, or a word up to twelve; up to five words; more.
    """
    words = normalise(reference).split()
    if words and words[0] in ("yes", "no") and len(words) == 1:
        return "yes/no"
    if len(words) == 1 and (words[0] in _NUMBERS or is_number(words[0])):
        return "number"
    return "phrase" if len(words) <= _PHRASE else "text"


def mark_answer(
    row_id: str, source: str, question: str, reference: str, text: str, kind: str | None = None
) -> AnsweredRow:
    """Mark one answer.

    Args:
        row_id: The row's.
        source: The row's source.
        question: The last question, without placeholder.
        reference: What the data answers.
        text: What the model wrote.
        kind: The row's own type of question; None takes `question_type`.
    """
    return AnsweredRow(
        question_id=row_id, source=source, type=kind or question_type(reference), question=question,
        reference=reference, text=text, exact=exact_match(text, reference), f1=token_f1(text, reference),
        rouge_l=rouge_l(text, reference),
    )  # fmt: skip


def answer_table(rows: Iterable[AnsweredRow]) -> AnswerTable:
    """Average marks over all rows, over each source and over each type of question.

    A group's loss is the mean over its tokens, and None where a row of it has none.
    """
    rows = list(rows)
    table = {"all": _marks(rows)}
    sources = list(dict.fromkeys(row["source"] for row in rows))
    for source in sources if len(sources) > 1 else []:
        name = f"{source} (source)" if source == "all" or source.startswith("type: ") else source
        table[name] = _marks([row for row in rows if row["source"] == source])
    types = dict.fromkeys(row["type"] for row in rows)
    types = dict.fromkeys([*(kind for kind in TYPES if kind in types), *types])
    for kind in types if len(types) > 1 else []:
        table[f"type: {kind}"] = _marks([row for row in rows if row["type"] == kind])
    return table


def _marks(rows: Sequence[AnsweredRow]) -> Marks:
    def share(values: Iterable[float]) -> float:
        return round(100 * sum(values) / max(1, len(rows)), 2)

    tokens = sum(row.get("loss_tokens", 0) for row in rows)
    loss = sum(row["loss"] * row["loss_tokens"] for row in rows if "loss" in row)
    return Marks(
        exact_match=share(row["exact"] for row in rows), f1=share(row["f1"] for row in rows),
        rouge_l=share(row["rouge_l"] for row in rows),
        loss=round(loss / tokens, 4) if tokens and all("loss" in row for row in rows) else None, questions=len(rows),
    )  # fmt: skip


def is_answer_table(table: dict[str, Any] | None) -> bool:
    """Whether a table is of free answers and not ScienceQA's."""
    return bool(table) and "all" in (table or {})
