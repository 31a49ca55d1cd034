"""Find the things and names of a sample that appear in no caption or box.

Only words of a list of visible things are compared, since answers may explain what everyone knows (`wet wood gets
slippery`). Sentences that suppose or deny something, and replies to questions that are denied, are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from lora_llava.data.conversation import Turn
from lora_llava.synthesis.contexts.context import Context
from lora_llava.synthesis.gates.example_copies import words_of
from lora_llava.synthesis.gates.gate_claims import SUPPOSED
from lora_llava.synthesis.gates.gate_nouns import HUMANS, nouns_of, plurals, same_things, words
from lora_llava.synthesis.gates.visible_things import KINDS, THINGS

MAX_UNGROUNDED = 0.7
FEWEST_UNGROUNDED = 4
"""Things that must be missing before a sample is refused: the share of two or three things says little."""
_ENGLISH = frozenset(words("the a an is are of in on and to it with for at"))
_ENGLISH_SHARE = 0.15
_DENIES = frozenset(words("no not nobody none never without neither nor cannot"))
_SENTENCE = re.compile(r"(?<=[.!?;:])\s+|\n+")
_NAME = re.compile(r"[A-Z][a-z\u00e0-\u00ff]{2,}(?:['\u2019]s)?(?: [A-Z][a-z\u00e0-\u00ff]{2,})*")
_NO_NAMES = frozenset(
    words(
        """i monday tuesday wednesday thursday friday saturday sunday january february march april may june july august
        september october november december english celsius fahrenheit christmas easter europe european america
        american asia asian africa african north south east west northern southern eastern western"""
    )
)


_MORE_PEOPLE = frozenset(
    words(
        """baker cook artist painter musician singer dancer barber carpenter butcher vendor seller shopper owner jockey
        pitcher batter umpire catcher goalie goalkeeper bride crew crowd audience someone somebody nobody he she his her
        they hand hands worker workers pedestrians cyclist rider people pilot captain sailor guard shepherd hiker runner
        swimmer tourist visitor traveler traveller commuter customer guest"""
    )
)
"""Words of captions that imply people."""


@dataclass(frozen=True, slots=True)
class Things:
    """The things and names of a sample.

    Attributes:
        total: Number of different ones.
        missing: Those that appear in no caption or box, in the order of their appearance.
    """

    total: int
    missing: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the missing ones, 0 to 1."""
        return len(self.missing) / self.total if self.total else 0.0


def find_things(context: Context, turns: tuple[Turn, ...], with_questions: bool = True) -> Things:
    """Find the things and names of a sample, and which of them the context lacks.

    Args:
        context: Captions and boxes of the image.
        turns: Questions and answers in turn.
        with_questions: Whether questions count; a description's request is our own.

    Returns:
        The things. Texts in other languages than English have none.
    """
    known = _known_words(context)
    found: dict[str, bool] = {}
    for place in range(0, len(turns) - 1, 2):
        question, answer = turns[place].text, turns[place + 1].text
        if re.match(r"\W*(?:no|nope|none)\b", answer, re.IGNORECASE):
            continue
        for text in (question, answer) if with_questions else (answer,):
            for thing in _things_of(text):
                found.setdefault(thing, _is_known(thing, known))
    return Things(len(found), tuple(thing for thing, is_known in found.items() if not is_known))


def _things_of(text: str) -> list[str]:
    """Return the visible things and the names in the sentences of an English text that claim something."""
    every = words_of(text)
    if not every or sum(word in _ENGLISH for word in every) < _ENGLISH_SHARE * len(every):
        return []
    found: list[str] = []
    for sentence in _SENTENCE.split(text):
        spoken = words_of(sentence.replace("n't", " not").replace("n\u2019t", " not"))
        if SUPPOSED.intersection(spoken) or _DENIES.intersection(spoken):
            continue
        place = 0
        while place < len(spoken):
            pair, word = " ".join(spoken[place : place + 2]), spoken[place]
            thing = _forms().get(pair) or _forms().get(word)
            found += [thing] if thing else []
            place += 2 if pair in _forms() else 1
        found += _names_of(sentence)
    return found


def _names_of(sentence: str) -> list[str]:
    """Return capitalised words that do not begin the sentence or a quotation; none in a text in title case."""
    spoken = re.findall(r"[^\W\d_]+", sentence)
    if sum(word[0].isupper() for word in spoken) * 2 > len(spoken):
        return []
    names = []
    for match in _NAME.finditer(sentence):
        before = sentence[: match.start()].rstrip()
        name = re.sub(r"['\u2019]s$", "", match[0])
        if before and before[-1] not in "\"'\u201c\u2018(*-" and not _NO_NAMES.intersection(words_of(name)):
            names.append(name)
    return names


@lru_cache(1)
def _forms() -> dict[str, str]:
    """Return every form of every visible thing, with the thing."""
    found: dict[str, str] = {}
    for thing in THINGS:
        for form in (thing, *plurals(thing)):
            found[form] = thing
    return found


@lru_cache(256)
def _known_words(context: Context) -> frozenset[str]:
    """Return the words of captions and labels, with synonyms, wider and narrower terms and kinds."""
    labels = frozenset(" ".join(box.label.lower().split()) for box in context.boxes)
    spoken = [word for text in (*context.captions, *labels) for word in words_of(text)]
    pairs = [" ".join(each) for each in pairwise(spoken)]
    things = {_forms()[form] for form in (*spoken, *pairs) if form in _forms()}
    found = {*spoken, *pairs, *things, *nouns_of(frozenset((*labels, *things)))}
    for thing in list(found):
        found.update(same_things(thing))
    if found & (HUMANS | _MORE_PEOPLE):
        found |= HUMANS
    for kind, members in KINDS.items():
        if kind in found or found.intersection(members):
            found.add(kind)
    return frozenset(found)


def _is_known(thing: str, known: frozenset[str]) -> bool:
    """Check whether a context names a thing, a part of its name for a compound, or all words of a name."""
    if thing in known or any(form in known for form in plurals(thing)):
        return True
    parts = words_of(thing)
    return all(part in known for part in parts) or (not thing[0].isupper() and parts[-1] in known)
