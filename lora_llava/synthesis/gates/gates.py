"""Quality gates for the teacher's answers; the first gate that fails determines the reason of the rejection."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from lora_llava.synthesis.contexts.context import Context
from lora_llava.synthesis.gates.example_copies import ExampleRuns, words_of
from lora_llava.synthesis.gates.forbidden_text import find_control, find_corner, find_forbidden
from lora_llava.synthesis.gates.gate_amounts import wrong_amount
from lora_llava.synthesis.gates.gate_claims import denied_object, wrong_count
from lora_llava.synthesis.gates.gate_nouns import Known, read_context
from lora_llava.synthesis.gates.gate_places import wrong_place
from lora_llava.synthesis.gates.grounding import FEWEST_UNGROUNDED, MAX_UNGROUNDED, find_things
from lora_llava.synthesis.gates.question_forms import circles, is_statement, only_asks, shared_run
from lora_llava.synthesis.sample import Flavour, Rejection, Turns

REASONS: dict[str, str] = {
    "unreadable": "neither the requested JSON nor another known form",
    "cut off": "the text ends in the middle",
    "turn order": "questions and answers do not alternate",
    "empty": "a question or an answer is empty",
    "number of turns": "more or fewer questions than the flavour allows",
    "too long": "more words than the limits allow",
    "control characters": "control characters or other characters that are not text",
    "template marker": "an image placeholder or a marker of a chat template",
    "link or markup": "a link, a script, HTML, or Markdown links or images",
    "coordinates": "coordinates of a box",
    "speaks as a model": "the writer presents itself as a program that saw no image",
    "source named": "mentions captions, boxes or a description instead of the image",
    "no answer": "a refusal, or a statement that the answer is unknown",
    "copied example": "eight or more words of an example of the prompt that the context does not contain",
    "repeated question": "the same question twice in a conversation",
    "not a question": "a statement where a question belongs",
    "answer is a question": "an answer that repeats its question, or that is itself a question",
    "repetition": "the text repeats itself",
    "too short": "fewer words than the limits require",
    "wrong count": "a count that neither boxes nor captions support",
    "denied object": "denies an object that has a box",
    "wrong place": "left and right are confused, according to the boxes",
    "ungrounded": "too many things and names that no caption or box contains",
    "duplicate": "the same as an earlier sample, except for case, punctuation and spaces",
}
"""Every reason for a rejection and its description in reports, in the order of the gates."""


_QUESTION_WORDS = (2, 120)
_MIN_WORDS: dict[Flavour, int] = {"conversation": 2, "detail": 15, "reasoning": 10}
"""Untuned. Short answers are fine in a conversation (`Two.`), but a description as short as a caption is not detailed,
and a few words cannot contain reasoning."""
_MAX_WORDS: dict[Flavour, int] = {"conversation": 900, "detail": 600, "reasoning": 600}
"""Untuned. 900 English words are about 1,250 tokens. With the questions and the 576 tokens of an image of 336 pixels
they fill a row of 2,048 tokens, LLaVA-1.5's training length (haotian-liu/LLaVA, scripts/v1_5/finetune.sh)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of turns and words, inclusive.

    Attributes:
        min_turns: Minimum number of questions in a conversation; the other flavours have one question (arXiv
            2304.08485, section 3).
        max_turns: Maximum number of questions in a conversation.
        min_words: Minimum number of words in all answers of a sample together; None sets 2 for conversation, 15 for
            detail and 10 for reasoning.
        max_words: Maximum number of words in all answers together; None sets 900, 600 and 600.
        max_ungrounded: Maximum share of things and names that no caption or box contains; 1 accepts any share.
    """

    min_turns: int = 2
    max_turns: int = 12
    min_words: int | None = None
    max_words: int | None = None
    max_ungrounded: float = MAX_UNGROUNDED


_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:['\u2019.,:/-][^\W_]+)*")
"""Chinese and Japanese have no spaces, so each of their characters counts as a word."""
_LONG_ANSWER, _LONG_SENTENCE, _WORD_RUN = 8, 4, 5
"""Words from which a repeated answer or sentence, or a run of one word, is a repetition (untuned). Shorter answers and
phrases may repeat."""


@dataclass(frozen=True)
class _Case:
    """One sample and what the gates compare it with."""

    context: Context
    turns: Turns
    flavour: Flavour
    limits: Limits
    examples: ExampleRuns | None

    @cached_property
    def numbers(self) -> Known:
        """Counts that the context states of its objects."""
        return read_context(self.context)

    @cached_property
    def known(self) -> str:
        """Captions and labels of the context: text that the sample may repeat."""
        return "\n".join((*self.context.captions, *(box.label for box in self.context.boxes)))

    def words(self, role: str) -> list[int]:
        """Count the words of each turn of a role."""
        return [len(_WORD.findall(turn.text)) for turn in self.turns if turn.role == role]

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        """Questions with their answers; a description's request is empty, since it does not limit the answer."""
        texts = ["" if self.flavour == "detail" and turn.role == "user" else turn.text for turn in self.turns]
        return zip(texts[::2], texts[1::2], strict=True)


def check_sample(
    context: Context, turns: Turns, flavour: Flavour, limits: Limits, examples: ExampleRuns | None = None
) -> Rejection | None:
    """Check a sample with every gate except the one for duplicates, which is `SeenSamples`.

    Args:
        context: Captions and boxes that the teacher saw.
        turns: Turns of the answer, from `parse_sample`.
        flavour: Kind of sample that was requested.
        limits: Limits of turns and words.
        examples: Runs of words of the prompt's examples; None skips the gate for copies of them.

    Returns:
        The rejection by the first gate that fails; None if all pass.
    """
    case = _Case(context, turns, flavour, limits, examples)
    return next((rejection for rejection in (gate(case) for gate in _GATES) if rejection), None)


def _empty(case: _Case) -> Rejection | None:
    if not case.turns:
        return Rejection("empty", "no turns")
    for number, turn in enumerate(case.turns, 1):
        if not any(character.isalnum() for character in turn.text):
            return Rejection("empty", f"turn {number}: {_excerpt(turn.text)}")
    return None


def _turn_order(case: _Case) -> Rejection | None:
    for number, turn in enumerate(case.turns, 1):
        if turn.role != (expected := "user" if number % 2 else "assistant"):
            return Rejection("turn order", f"turn {number} is from the {turn.role}; expected the {expected}")
    return Rejection("turn order", "the last question has no answer") if len(case.turns) % 2 else None


def _number_of_turns(case: _Case) -> Rejection | None:
    count, limits = len(case.turns) // 2, case.limits
    fewest, most = (limits.min_turns, limits.max_turns) if case.flavour == "conversation" else (1, 1)
    if fewest <= count <= most:
        return None
    return Rejection("number of turns", f"{count}; expected {fewest if fewest == most else f'{fewest} to {most}'}")


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
    # A description answers one of our own requests, whose length is not checked.
    shortest = min(case.words("user")) if case.flavour != "detail" else _QUESTION_WORDS[0]
    return Rejection("too short", f"{shortest} words in a question") if shortest < _QUESTION_WORDS[0] else None


def _control_characters(case: _Case) -> Rejection | None:
    found = next((found for turn in case.turns if (found := find_control(turn.text))), None)
    return Rejection("control characters", found) if found else None


def _forbidden(case: _Case) -> Rejection | None:
    """Apply the rules of `gate_rules`, each to all turns before the next rule."""
    for rule in ("template marker", "link or markup", "coordinates", "speaks as a model", "source named"):
        for turn in case.turns:
            if found := find_forbidden(rule, turn.text, case.known):
                return Rejection(rule, _excerpt(found))
        if rule == "coordinates" and (rejection := _corner(case)):
            return rejection
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


def _copied_example(case: _Case) -> Rejection | None:
    if case.examples is None:
        return None
    # A description's request is our own text.
    texts = [turn.text for turn in case.turns if case.flavour != "detail" or turn.role == "assistant"]
    found = next((found for text in texts if (found := case.examples.find_copy(text, case.context))), None)
    return Rejection("copied example", _excerpt(found)) if found else None


def _question_forms(case: _Case) -> Rejection | None:
    """Reject statements as questions, and answers that ask."""
    for question, answer in zip(case.turns[::2], case.turns[1::2], strict=True):
        if case.flavour != "detail" and is_statement(question.text):
            return Rejection("not a question", _excerpt(question.text))
        if normalise(question.text) == normalise(answer.text) or only_asks(answer.text):
            return Rejection("answer is a question", _excerpt(answer.text))
    return None


def _repeated_question(case: _Case) -> Rejection | None:
    counts = Counter(normalise(turn.text) for turn in case.turns if turn.role == "user")
    repeated = [question for question, count in counts.items() if count > 1]
    return Rejection("repeated question", _excerpt(repeated[0])) if repeated else None


def _repetition(case: _Case) -> Rejection | None:
    """Reject a sentence three times in a turn, a word five times in a row, one long answer to two questions, a run of
    ten words in two answers, or a text whose phrases return."""
    answers = Counter(normalise(turn.text) for turn in case.turns if turn.role == "assistant")
    repeated = [text for text, count in answers.items() if count > 1 and len(text.split()) >= _LONG_ANSWER]
    if run := shared_run([turn.text for turn in case.turns if turn.role == "assistant"]):
        repeated.append(run)
    for turn in case.turns:
        sentences = Counter(normalise(part) for part in re.split(r"(?<=[.!?])\s|\n", turn.text))
        repeated += [text for text, count in sentences.items() if count > 2 and len(text.split()) >= _LONG_SENTENCE]
        repeated += circles(turn.text)
        words = normalise(turn.text).split()
        repeated += [word for i, word in enumerate(words) if words[i : i + _WORD_RUN] == [word] * _WORD_RUN]
    return Rejection("repetition", _excerpt(repeated[0])) if repeated else None


def _wrong_count(case: _Case) -> Rejection | None:
    known = case.numbers
    problems = (
        wrong_count(known, question, answer) or wrong_amount(known, case.context, question, answer)
        for question, answer in case.pairs
    )
    return next((Rejection("wrong count", problem) for problem in problems if problem), None)


def _denied_object(case: _Case) -> Rejection | None:
    problems = (denied_object(case.numbers, question, answer) for question, answer in case.pairs)
    return next((Rejection("denied object", problem) for problem in problems if problem), None)


def _wrong_place(case: _Case) -> Rejection | None:
    problems = (wrong_place(case.context, case.numbers, answer) for _, answer in case.pairs)
    return next((Rejection("wrong place", problem) for problem in problems if problem), None)


def _ungrounded(case: _Case) -> Rejection | None:
    things = find_things(case.context, case.turns, with_questions=case.flavour != "detail")
    if len(things.missing) < FEWEST_UNGROUNDED or things.share <= case.limits.max_ungrounded:
        return None
    named = ", ".join(things.missing[:5])
    return Rejection("ungrounded", f"{len(things.missing)} of {things.total}: {named}")


_GATES: tuple[Callable[[_Case], Rejection | None], ...] = (
    _turn_order,
    _empty,
    _number_of_turns,
    _too_long,
    _control_characters,
    _forbidden,
    _no_answer,
    _copied_example,
    _repeated_question,
    _question_forms,
    _repetition,
    _too_short,
    _wrong_count,
    _denied_object,
    _wrong_place,
    _ungrounded,
)
"""In the order of `REASONS`. Length is checked early, so that overlong texts are not searched. `too short` comes after
`no answer`, because refusals are short too."""


class SeenSamples:
    """Finder of duplicate samples; call `check` in the order of the tasks. It keeps 16 bytes of a hash per sample."""

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}

    def check(self, task_id: str, turns: Turns, flavour: Flavour) -> Rejection | None:
        """Check whether an equal sample was seen before, and remember this one if not.

        Args:
            task_id: Task of the sample; a sample is not a duplicate of itself.
            turns: Turns that passed `check_sample`.
            flavour: Kind of sample; for `detail` only the descriptions are compared, since the requests are our own.

        Returns:
            A rejection that names the earlier task; None if the sample is new.
        """
        turns = tuple(turn for turn in turns if flavour != "detail" or turn.role == "assistant")
        text = "\n".join(normalise(turn.text) for turn in turns)
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        earlier = self._seen.setdefault(key, task_id)
        return Rejection("duplicate", f"of {earlier}") if earlier != task_id else None


@lru_cache(512)
def normalise(text: str) -> str:
    """Reduce a text to its lower-case words; a text without letters and digits is only stripped."""
    return " ".join(words_of(text)) or unicodedata.normalize("NFKC", text).casefold().strip()


def _excerpt(text: str) -> str:
    """Quote the start of a text on one line."""
    text = " ".join(text.split())
    return repr(text if len(text) <= 80 else f"{text[:80]}...")
