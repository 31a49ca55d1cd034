"""Whether an answer of the teacher may become a row: gate after gate, the first that fails gives the reason."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from lora_llava.synthesis.contexts.context import Context
from lora_llava.synthesis.gates.gate_claims import denied_object, wrong_count, wrong_place
from lora_llava.synthesis.gates.gate_nouns import Known, read_context
from lora_llava.synthesis.gates.gate_rules import find_control, find_corner, find_forbidden
from lora_llava.synthesis.sample import Flavour, Rejection, Turns

REASONS: dict[str, str] = {
    "unreadable": "neither the JSON that was asked for nor a form that is understood in its place",
    "cut off": "the text ends in the middle",
    "turn order": "questions and answers do not take turns",
    "empty": "a question or an answer without a word",
    "number of turns": "more or fewer questions than the flavour has",
    "too long": "more words than the limits allow",
    "control characters": "characters that are no text",
    "template marker": "an image placeholder or a marker of a chat template",
    "link or markup": "a link, a script, HTML or Markdown's links and images",
    "coordinates": "numbers of a box",
    "speaks as a model": "speaks as a program that was shown no image",
    "source named": "speaks of captions, boxes or a description in place of the image",
    "no answer": "refuses, or says that it cannot be told",
    "repeated question": "the same question twice in a conversation",
    "repetition": "goes round in circles",
    "too short": "fewer words than the limits ask for",
    "wrong count": "a number that neither boxes nor captions bear out",
    "denied object": "says that something is not there of which there is a box",
    "wrong place": "left for right, by the boxes",
    "duplicate": "the same as an earlier sample, but for case, punctuation and spaces",
}
"""Every reason of a rejection, and what it means."""


_QUESTION_WORDS = (2, 120)
_MIN_WORDS: dict[Flavour, int] = {"conversation": 2, "detail": 15, "reasoning": 10}
"""Untuned. Short answers are right in a conversation (`Two.`), but a description of a caption's length is not detailed,
and an answer in a few words takes no steps."""
_MAX_WORDS: dict[Flavour, int] = {"conversation": 900, "detail": 600, "reasoning": 600}
"""Untuned. 900 words of English are some 1,250 tokens, which with the 576 of an image of 336 pixels and the questions
fill the rows of 2,048 tokens that LLaVA-1.5 was trained on (haotian-liu/LLaVA, scripts/v1_5/finetune.sh)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Fewest and most, both allowed.

    Attributes:
        min_turns: Questions in a conversation; the other flavours have one (arXiv 2304.08485, section 3).
        max_turns: The same, at most.
        min_words: In all answers of a sample together; None takes 2 for a conversation, 15 for a description, 10 for
            reasoning.
        max_words: The same, at most; None takes 900, 600 and 600.
    """

    min_turns: int = 2
    max_turns: int = 12
    min_words: int | None = None
    max_words: int | None = None


_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:['\u2019.,:/-][^\W_]+)*")
"""Chinese and Japanese have no spaces: a character counts for a word."""
_LONG_ANSWER, _LONG_SENTENCE, _WORD_RUN = 8, 4, 5
"""Words; untuned. Short answers and phrases may well come again."""


@dataclass(frozen=True)
class _Case:
    """A sample before the gates."""

    context: Context
    turns: Turns
    flavour: Flavour
    limits: Limits

    @cached_property
    def numbers(self) -> Known:
        """What the context says of its objects' numbers."""
        return read_context(self.context)

    @cached_property
    def known(self) -> str:
        """What the context itself says, which a text may say too."""
        return "\n".join((*self.context.captions, *(box.label for box in self.context.boxes)))

    def words(self, role: str) -> list[int]:
        """Of each turn of a role."""
        return [len(_WORD.findall(turn.text)) for turn in self.turns if turn.role == role]

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        """Questions, as far as they limit what is answered, with their answers."""
        texts = ["" if self.flavour == "detail" and turn.role == "user" else turn.text for turn in self.turns]
        return zip(texts[::2], texts[1::2], strict=True)


def check_sample(context: Context, turns: Turns, flavour: Flavour, limits: Limits) -> Rejection | None:
    """Put a sample through the gates.

    Args:
        context: What the teacher was shown of the image.
        turns: What it wrote, from `parse_sample`.
        flavour: What was asked for.
        limits: Of turns and words.

    Returns:
        The first gate that it fails, in the order of `REASONS`; None where it passes all. Duplicates are found by
        `SeenSamples`.
    """
    case = _Case(context, turns, flavour, limits)
    return next((told for told in (gate(case) for gate in _GATES) if told), None)


def _empty(case: _Case) -> Rejection | None:
    if not case.turns:
        return Rejection("empty", "no turns")
    for number, turn in enumerate(case.turns, 1):
        if not any(character.isalnum() for character in turn.text):
            return Rejection("empty", f"turn {number}: {_excerpt(turn.text)}")
    return None


def _turn_order(case: _Case) -> Rejection | None:
    for number, turn in enumerate(case.turns, 1):
        if turn.role != (due := "user" if number % 2 else "assistant"):
            return Rejection("turn order", f"turn {number} is the {turn.role}'s; the {due}'s was due")
    return Rejection("turn order", "the last question has no answer") if len(case.turns) % 2 else None


def _number_of_turns(case: _Case) -> Rejection | None:
    count, limits = len(case.turns) // 2, case.limits
    fewest, most = (limits.min_turns, limits.max_turns) if case.flavour == "conversation" else (1, 1)
    if fewest <= count <= most:
        return None
    return Rejection("number of turns", f"{count} in place of {fewest if fewest == most else f'{fewest} to {most}'}")


def _too_long(case: _Case) -> Rejection | None:
    most = case.limits.max_words
    words = case.words("assistant")
    if sum(words) > (_MAX_WORDS[case.flavour] if most is None else most):
        return Rejection("too long", f"{sum(words)} words in the answers")
    longest = max(case.words("user"))
    return Rejection("too long", f"{longest} words in a question") if longest > _QUESTION_WORDS[1] else None


def _too_short(case: _Case) -> Rejection | None:
    fewest = case.limits.min_words
    words = case.words("assistant")
    if sum(words) < (_MIN_WORDS[case.flavour] if fewest is None else fewest):
        return Rejection("too short", f"{sum(words)} words in the answers")
    # A description answers a request of the prompt's, which is as short as its author wanted.
    shortest = min(case.words("user")) if case.flavour != "detail" else _QUESTION_WORDS[0]
    return Rejection("too short", f"{shortest} words in a question") if shortest < _QUESTION_WORDS[0] else None


def _control_characters(case: _Case) -> Rejection | None:
    found = next((found for turn in case.turns if (found := find_control(turn.text))), None)
    return Rejection("control characters", found) if found else None


def _forbidden(case: _Case) -> Rejection | None:
    """The rules of `gate_rules`, one for all turns before the next."""
    for rule in ("template marker", "link or markup", "coordinates", "speaks as a model", "source named"):
        for turn in case.turns:
            if found := find_forbidden(rule, turn.text, case.known):
                return Rejection(rule, _excerpt(found))
        if rule == "coordinates" and (told := _corner(case)):
            return told
    return None


def _corner(case: _Case) -> Rejection | None:
    corners = {f"{round(corner, 3)}" for box in case.context.boxes for corner in box.corners}
    known = case.known
    for turn in case.turns:
        if (found := find_corner(turn.text, corners)) and found not in known:
            return Rejection("coordinates", _excerpt(found))
    return None


def _no_answer(case: _Case) -> Rejection | None:
    for turn in case.turns:
        if turn.role == "assistant" and (found := find_forbidden("no answer", turn.text, case.known)):
            return Rejection("no answer", _excerpt(found))
    return None


def _repeated_question(case: _Case) -> Rejection | None:
    counts = Counter(normalise(turn.text) for turn in case.turns if turn.role == "user")
    again = [question for question, count in counts.items() if count > 1]
    return Rejection("repeated question", _excerpt(again[0])) if again else None


def _repetition(case: _Case) -> Rejection | None:
    """A teacher that goes round in circles: a sentence three times in a turn, a word five times running, a long answer
    to two questions."""
    answers = Counter(normalise(turn.text) for turn in case.turns if turn.role == "assistant")
    again = [text for text, count in answers.items() if count > 1 and len(text.split()) >= _LONG_ANSWER]
    for turn in case.turns:
        sentences = Counter(normalise(part) for part in re.split(r"(?<=[.!?])\s|\n", turn.text))
        again += [text for text, count in sentences.items() if count > 2 and len(text.split()) >= _LONG_SENTENCE]
        words = normalise(turn.text).split()
        again += [word for i, word in enumerate(words) if words[i : i + _WORD_RUN] == [word] * _WORD_RUN]
    return Rejection("repetition", _excerpt(again[0])) if again else None


def _wrong_count(case: _Case) -> Rejection | None:
    told = (wrong_count(case.numbers, question, answer) for question, answer in case.pairs)
    return next((Rejection("wrong count", each) for each in told if each), None)


def _denied_object(case: _Case) -> Rejection | None:
    told = (denied_object(case.numbers, question, answer) for question, answer in case.pairs)
    return next((Rejection("denied object", each) for each in told if each), None)


def _wrong_place(case: _Case) -> Rejection | None:
    told = (wrong_place(case.context, case.numbers, answer) for _, answer in case.pairs)
    return next((Rejection("wrong place", each) for each in told if each), None)


_GATES: tuple[Callable[[_Case], Rejection | None], ...] = (
    _turn_order,
    _empty,
    _number_of_turns,
    _too_long,
    _control_characters,
    _forbidden,
    _no_answer,
    _repeated_question,
    _repetition,
    _too_short,
    _wrong_count,
    _denied_object,
    _wrong_place,
)
"""In the order of `REASONS`. What is too long is not searched any further; what is too short comes after refusals,
which are short too."""


class SeenSamples:
    """Finds samples that were there before, by 16 bytes of a hash each; to be asked in the order of the tasks."""

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}

    def check(self, task_id: str, turns: Turns, flavour: Flavour) -> Rejection | None:
        """Look a sample up, and keep it where it is new.

        Args:
            task_id: Whose it is; the same sample of the same task is no duplicate of itself.
            turns: That passed `check_sample`.
            flavour: What was asked for: of `detail` the descriptions alone are compared, as the requests are ours.

        Returns:
            The rejection, which names the earlier task; None where the sample is new.
        """
        turns = tuple(turn for turn in turns if flavour != "detail" or turn.role == "assistant")
        text = "\n".join(normalise(turn.text) for turn in turns)
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        earlier = self._seen.setdefault(key, task_id)
        return Rejection("duplicate", f"of {earlier}") if earlier != task_id else None


@lru_cache(512)
def normalise(text: str) -> str:
    """Text without case, punctuation and spaces that differ; what has no letter or digit stays as it is."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"[^\W_]+", folded)) or folded.strip()


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 80 else f"{text[:80]}...")
