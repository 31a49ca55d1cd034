"""Forms of questions and answers: statements where a question belongs, answers that ask, and circling phrases."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lora_llava.synthesis.gates.example_copies import words_of
from lora_llava.synthesis.gates.gate_nouns import words

_QUESTION_MARKS = "?\uff1f\u061f\u037e\u2e2e\u1367\u055e"
"""Question marks, of these scripts: Latin, full width, Arabic, Greek, Ethiopic, Armenian."""
_ENGLISH = frozenset(words("the is are was were there this these that it an has have with and of"))
_ASKS = (
    r"(?:what|which|who|whom|whose|when|where|why|how|is|are|was|were|do|does|did|can|could|will|would|should|shall|"
    r"may|might|must|has|have|had|am|isn't|aren't|wasn't|don't|doesn't|can't|any)\b"
)
_REQUESTS = (
    r"(?:please|kindly|describe|explain|tell|name|list|give|count|compare|identify|find|point|show|suggest|write|"
    r"imagine|summari[sz]e|discuss|say|state|let|let's|provide|pick|choose|guess|estimate|consider|think|look|walk|talk|"
    r"help|read|report|outline|analy[sz]e|mention|define|create|make|suppose|assume|continue|go|take|sketch|interpret|"
    r"determine|decide|spell|translate|recommend|propose|elaborate|share|locate|examine|note|classify|sort|rank|rate|"
    r"predict|infer|deduce|judge|justify|argue|draw|see|check|specify|add|answer|ask|quote|i wonder|i want|i would|i'd|"
    r"i need|i am curious|i'm curious|i am not sure|i'm not sure|i do not|i don't|i cannot|i can't|you mention|"
    r"you said)\b"
)
_CLAUSE_START = r"(?:^|[.!,;:\u2013\u2014-]\s*|\b(?:and|then|but|so|please|now|just|briefly|next)\s+)[\"'\u201c(]*"
_ASKING = re.compile(rf"{_CLAUSE_START}(?:{_ASKS}|{_REQUESTS})", re.IGNORECASE)
_SENTENCES = re.compile(rf"[^.!{_QUESTION_MARKS}]*[.!{_QUESTION_MARKS}]+|[^.!{_QUESTION_MARKS}]+$")
_TAG = re.compile(
    r",\s*(?:(?:is|are|was|were|do|does|did|has|have|had|can|could|will|would|should)(?:n't)? "
    r"(?:it|they|he|she|that|this|there|you|we|i)(?: not)?|right|no|yes|ok|okay|eh)\W*$",
    re.IGNORECASE,
)
_STARTS_ASKING = re.compile(rf"\W*(?:(?:so|and|but|or|well|hmm|oh|in|at|on|for|to|from|by|with)\W+)?{_ASKS}", re.I)
_QUOTING = re.compile(r"[:\"\u201c\u201d\u00ab]")


def is_statement(question: str) -> bool:
    """Check whether an English text that should ask states something.

    Args:
        question: A question of a sample.

    Returns:
        Whether it has no question mark, no question word or verb at the start of a clause, and no request such as
        `describe`. Texts in other languages are never called statements, because requests in them are unknown here.
    """
    plain = question.replace("\u2019", "'").strip()
    if any(mark in plain for mark in _QUESTION_MARKS) or _ASKING.search(plain):
        return False
    found = words_of(plain)
    return bool(_ENGLISH.intersection(found)) or found[:1] == ["a"]


def only_asks(answer: str) -> bool:
    """Check whether an answer consists of questions alone.

    Args:
        answer: An answer of a sample.

    Returns:
        Whether every sentence ends with a question mark. A tag (`..., isn't it?`) and a quoted question
        (`It says "Where next?"`) are statements.
    """
    found = [part.strip() for part in _SENTENCES.findall(answer.replace("\u2019", "'")) if part.strip(" \n*_\"'")]
    return bool(found) and all(_is_question(sentence) for sentence in found)


def _is_question(sentence: str) -> bool:
    if sentence.rstrip("*_ \"'\u201d)")[-1:] not in tuple(_QUESTION_MARKS) or _TAG.search(sentence):
        return False
    return bool(_STARTS_ASKING.match(sentence)) or not _QUOTING.search(sentence)


_CIRCLES = ((9, 0.8), (40, 0.6))
"""Words from which a sentence and a whole turn are checked, and the share of distinct trigrams below which they circle.
The lowest of 225 good samples: 0.95 of a sentence, 0.97 of a turn; of the demo's, which list things twice: 0.86, 0.65.
Useless sentences of SmolLM2-135M that circle have 0.60 to 0.76 (tests/benchmarks/results/teacher_smollm2.json)."""


def circles(text: str) -> list[str]:
    """Find sentences, or the whole text, whose phrases return again and again.

    Args:
        text: A question or an answer.

    Returns:
        Each of these as its words, in order; the natural repetition of a word (`very very`) does not count.
    """
    parts = [words_of(part) for part in re.split(r"(?<=[.!?])\s|\n", text)]
    (sentence_words, sentence_share), (turn_words, turn_share) = _CIRCLES
    found = [part for part in parts if len(part) >= sentence_words and trigram_share(part) < sentence_share]
    whole = words_of(text)
    if len(whole) >= turn_words and trigram_share(whole) < turn_share:
        found.append(whole)
    return [" ".join(part) for part in found]


_SHARED_RUN = 10
"""Words in a row from which two answers of a sample repeat each other (the longest run of 225 good samples: 4)."""


def shared_run(answers: list[str]) -> str | None:
    """Find a run of words that two answers of a sample have in common.

    Args:
        answers: The answers.

    Returns:
        The first such run of `_SHARED_RUN` words; None if there is none.
    """
    seen: set[tuple[str, ...]] = set()
    for answer in answers:
        found = words_of(answer)
        own = [tuple(found[place : place + _SHARED_RUN]) for place in range(len(found) - _SHARED_RUN + 1)]
        for run in own:
            if run in seen:
                return " ".join(run)
        seen.update(own)
    return None


def trigram_share(found: list[str]) -> float:
    """Return the share of distinct trigrams in a list of words; 1 for fewer than three words."""
    trigrams = list(_trigrams(found))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


def _trigrams(found: list[str]) -> Iterator[tuple[str, ...]]:
    return zip(found, found[1:], found[2:], strict=False)
