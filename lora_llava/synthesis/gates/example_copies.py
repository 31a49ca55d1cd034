"""Find text that a teacher copied from the examples of its prompt."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from lora_llava.synthesis.contexts.context import Context
from lora_llava.synthesis.gates.gate_nouns import words

RUN = 8
"""Words in a row from which text shared with an example is a copy. Shorter runs are common phrases: SmolLM2-135M copied
whole sentences."""
_COMMON = frozenset(
    words(
        """a an the this that these those it its he she they them his her their there here and or but as so than if
        of in on at to from by with for into onto over under above below behind between beside near next
        front top bottom left right middle center centre side edge corner background foreground is are
        was were be been being do does did can could will would has have had not no what which who whose
        where when why how many much one two three four five any some all other another each every more
        most very image picture photo scene seen see visible shown"""
    )
)
_BOX = re.compile(r"^[^\[\]]*\[[\d., ]*\]\s*$")


class ExampleRuns:
    """Runs of `RUN` words that occur in the examples of a prompt.

    Args:
        examples: The context and the answer of each example, as the teacher is sent them; the answer is JSON, or text.
    """

    def __init__(self, examples: Iterable[tuple[str, str]]) -> None:
        texts = [text for context, answer in examples for text in (*_captions(context), *_strings(answer))]
        self._runs = frozenset(run for text in texts for run in _runs(words_of(text)))

    def find_copy(self, text: str, context: Context) -> str | None:
        """Find the first run of words that an example contains and the image's own captions do not.

        Args:
            text: A question or an answer.
            context: Captions of the image.

        Returns:
            All words in a row that are copied, in lower case and without punctuation; None if there are fewer than
            `RUN`.
        """
        found = words_of(text)
        copied = [place for place, run in enumerate(_runs(found)) if run in self._runs]
        if not copied:
            return None
        own = {run for caption in context.captions for run in _runs(words_of(caption))}
        known = {word for text in (*context.captions, *(box.label for box in context.boxes)) for word in words_of(text)}
        copied = [
            place
            for place in copied
            if (run := tuple(found[place : place + RUN])) not in own and _has_content(run, known)
        ]
        if not copied:
            return None
        end = next(place for place in range(copied[0], len(found) + 1) if place not in copied)
        return " ".join(found[copied[0] : end - 1 + RUN])


def _has_content(run: tuple[str, ...], known: set[str]) -> bool:
    """Check whether a run has two words with a meaning of their own, or one that the context lacks.

    `Is it to the left or to the right of the` is a common question about any two things.
    """
    content = {word for word in run if word not in _COMMON}
    return len(content) > 1 or bool(content - known)


@lru_cache(512)
def words_of(text: str) -> list[str]:
    """Split a text into its words in lower case, without punctuation."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


def _runs(found: list[str]) -> Iterator[tuple[str, ...]]:
    return (tuple(found[place : place + RUN]) for place in range(len(found) - RUN + 1))


def _captions(context: str) -> list[str]:
    return [line for line in context.splitlines() if not _BOX.match(line)]


def _strings(answer: str) -> Iterator[str]:
    """Yield the texts of an answer in JSON; an answer in another form is one text."""
    try:
        waiting: list[Any] = [json.loads(answer)]
    except (ValueError, RecursionError):
        waiting = [answer]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, dict)):
            waiting.extend(value.values() if isinstance(value, dict) else value)
