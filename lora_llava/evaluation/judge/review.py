"""Prompts for the judge of two answers, and the parser of the two scores in its reply."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from lora_llava.core.errors import UserError
from lora_llava.inference.client.chat_request import ChatRequest

CATEGORIES = ("conv", "detail", "complex")
"""Categories of LLaVA-Bench's questions."""
PLACEHOLDERS = ("context", "question", "answer_1", "answer_2")
ORDERS = ("reference_first", "answer_first")
"""The first is LLaVA's. Judges favour a position (arXiv 2306.05685, section 3.3), so both orders are judged."""
ATTEMPTS = 3
"""Number of attempts before a judgement counts as unparsed; all but the first have a reminder in the prompt."""
_LAST_TEMPERATURE = 0.3
"""Temperature of the last attempt: at 0 the same prompt would yield the same text (untuned)."""
_NUMBER = r"((?:10|[0-9])(?:\.[0-9]+)?)"
_SCORE = rf"{_NUMBER}(?:\s*/\s*10|\s+out\s+of\s+10)?"
_BETWEEN = r"(?:\s*[,;|&]\s*(?:and\s+)?|\s+(?:and|vs\.?|versus)\s+|\s+)"
_WHO = r"(?:(?:ai\s+)?assistant|answer|response|model)"
_WORDS = r"(?:(?:(?:my|the|overall|final)\s+)*(?:scores?|ratings?|verdict|output))"
_BOTH = rf"(?:\s+for\s+{_WHO}s?\s+1\s+(?:and|&)\s+(?:{_WHO}\s+)?2)"
_PAIR = re.compile(
    rf"(?:{_WORDS}{_BOTH}?(?:,?\s+respectively)?(?:\s+are)?\s*[:=]?\s*)?"
    rf"[(\[{{]?\s*{_SCORE}{_BETWEEN}{_SCORE}\s*[)\]}}]?[.,;]?"
)
"""`8 9`, `(8, 9)`, `8/10 and 9/10`, `Scores: 8 9`."""
_ONE = (
    rf"(?:[12][.)]\s+)?(?:{_WORDS}\s+(?:for|of)\s+)?(?:the\s+)?{_WHO}\s*\#?\s*([12ab])(?:['\u2019]s)?"
    rf"(?:\s+{_WORDS})?\s*(?:[:=]|\s[-\u2013\u2014]\s)\s*{_SCORE}(?:\s*\([^()]*\))?"
)
_LABELLED = re.compile(rf"{_ONE}[.,;]?")
"""`Assistant 1: 8`, `Answer B: 9/10 (clear)`."""
_BOTH_LABELLED = re.compile(rf"{_ONE}\s*[,;|&]?\s*(?:and\s+)?{_ONE}[.,;]?")
_HEADING = re.compile(r"[^:]*\b(?:scor|rating|verdict|evaluation|overall|final)[^:]*:?")
_ASPECT = re.compile(r"helpful|relevan|accura|detail|clarity|correct")
_THINKING = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_LONGEST_LINE = 200

Scores = tuple[float, float]


@dataclass(frozen=True)
class JudgeCase:
    """One question and the two answers to it.

    Attributes:
        question_id: Id of the question.
        category: One of `CATEGORIES`.
        question: Text of the question.
        context: Description of the image.
        reference: The reference answer.
        answer: The answer to judge.
    """

    question_id: str
    category: str
    question: str
    context: str
    reference: str
    answer: str


@dataclass(frozen=True)
class JudgeSettings:
    """Settings of the judge.

    Attributes:
        swap: Whether each pair is judged in both orders.
        temperature: Sampling temperature; None leaves it to the server.
        max_tokens: Most tokens of a reply.
    """

    swap: bool = True
    temperature: float | None = 0.0
    max_tokens: int = 1024  # llava/eval/eval_gpt_review_bench.py, --max-tokens

    @property
    def orders(self) -> tuple[str, ...]:
        """Return the orders in which each pair is judged."""
        return ORDERS if self.swap else ORDERS[:1]


def load_prompts(folder: Path | None = None) -> dict[str, str]:
    """Read the prompts of the judge.

    Args:
        folder: Folder with `system.txt`, one file per category and `reminder.txt`; None for the shipped ones.

    Returns:
        Texts by file name without suffix.

    Raises:
        UserError: If a file is missing or not UTF-8, or the file of a category lacks a placeholder.
    """
    prompts = {}
    for name in ("system", *CATEGORIES, "reminder"):
        shipped = resources.files("lora_llava.evaluation.judge").joinpath("prompts", f"{name}.txt")
        source = shipped if folder is None else folder / f"{name}.txt"
        try:
            prompts[name] = source.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            raise UserError(f"--prompts: {source} is missing; copy it from {shipped} and edit it") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts: {source} is not UTF-8: {error.reason}; save it as UTF-8") from None
        lacking = [part for part in PLACEHOLDERS if name in CATEGORIES and f"{{{part}}}" not in prompts[name]]
        if lacking:
            raise UserError(f"--prompts: {source} lacks {{{lacking[0]}}}; insert the placeholder")
    return prompts


def prompt_hashes(prompts: Mapping[str, str]) -> dict[str, str]:
    """Return the SHA-256 of each prompt in hex."""
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in prompts.items()}


def judge_request(
    case: JudgeCase, order: str, prompts: Mapping[str, str], settings: JudgeSettings, attempt: int = 0
) -> ChatRequest:
    """Build the request for a judgement.

    Args:
        case: The question and its two answers.
        order: The answer that comes first, a member of `ORDERS`.
        prompts: From `load_prompts`.
        settings: Settings of the judge.
        attempt: Number of the attempt, from 0. Later ones have the reminder; the last has a temperature of at least
            0.3.
    """
    pair = (case.reference, case.answer) if order == ORDERS[0] else (case.answer, case.reference)
    values = dict(zip(PLACEHOLDERS, (case.context, case.question, *pair), strict=True))
    # One pass, so that braces within an answer are not replaced.
    text = re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), prompts[case.category])
    if attempt:
        text += f"\n\n{prompts['reminder']}"
    temperature = settings.temperature
    if temperature is not None and attempt == ATTEMPTS - 1:
        temperature = max(temperature, _LAST_TEMPERATURE)
    messages = [{"role": "system", "content": prompts["system"]}, {"role": "user", "content": text}]
    return ChatRequest(messages, settings.max_tokens, temperature)


def parse_scores(text: str) -> Scores | None:
    """Parse the two scores in a judge's reply.

    Scores are read from the start or the end of the text, either as a pair on one line or as one labelled line each:
    `8 9`, `8.5, 9`, `8/10 and 9/10`, `Assistant 1: 8` above `Assistant 2: 9`. Numbers within the text are not treated
    as scores: they may rate one aspect or belong to an argument. Of ten reviews published by Vicuna with such a pair in
    the middle, two were recorded with other scores.

    Args:
        text: The reply; Markdown and a leading `<think>` part are ignored.

    Returns:
        The scores of the first and the second answer, from 0 (which judges use for an empty answer) to 10. None if the
        text has no scores there, or has pairs that differ.
    """
    lines = _plain_lines(text)
    pairs: list[tuple[int, int, Scores]] = []
    singles: list[tuple[int, float]] = []
    place = 0
    while place < len(lines):
        found = _pair_at(lines, place)
        if found:
            pairs.append((place, place + found[0], found[1]))
        elif one := _LABELLED.fullmatch(lines[place]):
            singles.append((_which(one[1]), float(one[2])))
        place += found[0] if found else 1
    if len({scores for _, _, scores in pairs}) != 1:
        return None
    scores = pairs[0][2]
    at_start = pairs[0][0] == 0 or (pairs[0][0] == 1 and _is_heading(lines[0]))
    begin, end, _ = pairs[-1]
    titled_otherwise = begin > 0 and lines[begin - 1].endswith(":") and not _is_heading(lines[begin - 1])
    at_end = end == len(lines) and not titled_otherwise
    agreed = all(scores[which] == score for which, score in singles) and max(scores) <= 10
    return scores if agreed and (at_start or at_end) else None


def _plain_lines(text: str) -> list[str]:
    """Return the lines with text in lower case, without Markdown; lines too long for scores become "..."."""
    thinking = _THINKING.match(text)
    lines = []
    for line in text[thinking.end() if thinking else 0 :].split("\n"):
        plain = re.sub(r"^(?:#+|[-\u2022+>])\s+", "", re.sub(r"[*_`~]", "", line).strip()).strip().lower()
        if len(plain) > _LONGEST_LINE:
            lines.append("...")
        elif re.search(r"\w", plain):
            lines.append(plain)
    return lines


def _pair_at(lines: list[str], place: int) -> tuple[int, Scores] | None:
    """Return the number of lines from here that state two scores, and the scores; None if they do not."""
    if match := _PAIR.fullmatch(lines[place]):
        return 1, (float(match[1]), float(match[2]))
    if match := _BOTH_LABELLED.fullmatch(lines[place]):
        return _in_order(1, [(match[1], match[2]), (match[3], match[4])])
    following = lines[place : place + 2]
    matches = [match for line in following if (match := _LABELLED.fullmatch(line))]
    if len(matches) == 2:
        return _in_order(2, [(match[1], match[2]) for match in matches])
    return None


def _in_order(lines: int, given: list[tuple[str, str]]) -> tuple[int, Scores] | None:
    scores = {_which(label): float(score) for label, score in given}
    return (lines, (scores[0], scores[1])) if len(scores) == 2 else None


def _which(label: str) -> int:
    return 0 if label in "1a" else 1


def _is_heading(line: str) -> bool:
    return bool(_HEADING.fullmatch(line)) and not _ASPECT.search(line)
