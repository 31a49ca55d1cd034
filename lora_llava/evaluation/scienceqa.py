"""ScienceQA's score: the choice that an answer names, and accuracy in the benchmark's nine columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NotRequired, TypedDict

from lora_llava.evaluation.parsing.lenient_letters import parse_leniently

LETTERS = "ABCDE"
PARSERS = ("llava", "lenient")
"""Parsers of the letter in an answer: `parse_answer`, and `letters.parse_leniently`."""
COLUMNS = ("AVG", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
"""ScienceQA's columns (arXiv 2209.09513, table 3), the average first."""

_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_ANSWER = re.compile(r"The answer is ([A-Z]).")  # the dot is LLaVA's: any character

Table = dict[str, Any]
"""`{column: [percent, correct, count], ..., "unparsed": count}`, and `parser` if it is not LLaVA's."""


class Prediction(TypedDict):
    """One line of a predictions file."""

    question_id: str
    text: str
    prediction: int
    answer: int
    categories: list[str]
    scores: NotRequired[list[float]]
    problem: NotRequired[str]
    parser: NotRequired[str]


def parse_answer(text: str, num_choices: int) -> int:
    """Find the choice that an answer names, by LLaVA's rule (llava/eval/eval_science_qa.py).

    The text is a lone letter, starts with one as in "B. iron", or contains "The answer is B." exactly once.

    Args:
        text: The answer of the model.
        num_choices: Number of choices of the question.

    Returns:
        Index of the choice, or -1 if the text names none or one beyond the choices.
    """
    letters = LETTERS[:num_choices]
    if text in LETTERS and len(text) == 1:
        letter = text
    elif len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        found = _ANSWER.findall(text)
        if len(found) != 1:
            return -1
        letter = found[0]
    return letters.find(letter)


def categories(subject: str, grade: str, has_image: bool, has_hint: bool) -> list[str]:
    """Return the columns in which a question counts, except AVG.

    Args:
        subject: `natural science`, `social science` or `language science`.
        grade: `grade1` to `grade12`.
        has_image: Whether it has an image.
        has_hint: Whether it has a textual context.

    Returns:
        One of NAT, SOC and LAN; TXT and IMG, or NO for neither; G1-6 or G7-12.
    """
    columns = [_SUBJECTS[subject]] if subject in _SUBJECTS else []
    columns += ["TXT"] * has_hint + ["IMG"] * has_image + ["NO"] * (not has_hint and not has_image)
    number = re.sub(r"\D", "", grade)
    if number:
        columns.append("G1-6" if int(number) <= 6 else "G7-12")
    return columns


def read_letter(text: str, question: Mapping[str, Any], parser: str = "llava") -> int:
    """Find the choice that an answer names.

    Args:
        text: The answer of the model.
        question: A mapping with `num_choices`, and for the lenient parser `choices`.
        parser: A member of `PARSERS`.

    Returns:
        Index of the choice, or -1.
    """
    if parser == "llava":
        return parse_answer(text, question["num_choices"])
    return parse_leniently(text, question["num_choices"], question.get("choices", ()))


def make_prediction(
    question_id: str, text: str, question: Mapping[str, Any], choice: int | None = None, parser: str = "llava"
) -> Prediction:
    """Score one answer.

    Args:
        question_id: Id of the problem.
        text: The answer of the model.
        question: `answer`, `num_choices`, `subject`, `grade`, `has_image` and `has_hint`.
        choice: Index of the chosen answer; None reads it from the text.
        parser: Parser of the letter, a member of `PARSERS`.
    """
    columns = categories(question["subject"], question["grade"], question["has_image"], question["has_hint"])
    prediction = read_letter(text, question, parser) if choice is None else choice
    found = Prediction(
        question_id=question_id, text=text, prediction=prediction, answer=question["answer"], categories=columns
    )
    if choice is None and parser != "llava":
        found["parser"] = parser
    return found


def score(predictions: Iterable[Prediction], parser: str = "llava") -> Table:
    """Compute the table of accuracies.

    Args:
        predictions: From `make_prediction`.
        parser: Parser of the letters; the table names it if it is not LLaVA's.

    Returns:
        For every column the percentage to two decimals, the correct answers and the questions; and the number of
        answers that named no choice. These count as wrong.
    """
    counts = {column: [0, 0] for column in COLUMNS}
    unparsed = 0
    for item in predictions:
        unparsed += item["prediction"] == -1
        for column in ("AVG", *item["categories"]):
            counts[column][0] += item["prediction"] == item["answer"]
            counts[column][1] += 1
    table: Table = {
        column: [round(100 * correct / count, 2) if count else 0.0, correct, count]
        for column, (correct, count) in counts.items()
    }
    return table | {"unparsed": unparsed} | ({"parser": parser} if parser != "llava" else {})
