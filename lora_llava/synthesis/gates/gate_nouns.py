"""English nouns for a context's objects, and the counts that its boxes and captions state."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from lora_llava.synthesis.contexts.context import Context

Relation = Literal["same", "wider", "narrower"]
"""Relation of a noun to a label: the same thing, a wider term (`animal` for `dog`), or a narrower one (`man` for
`person`)."""


def words(text: str) -> tuple[str, ...]:
    """Split a text into its words."""
    return tuple(text.split())


_NUMBERS = {
    word: value
    for value, word in enumerate(
        words(
            """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
            seventeen eighteen nineteen twenty"""
        )
    )
}
_TOKEN = re.compile(r"[^\W_]+(?:['\u2019.:/-][^\W_]+)*['\u2019]?|[^\w\s]")
_SAME = {
    "person": ("human", "individual", "human being"),
    "tv": ("television", "tv set", "television set"),
    "couch": ("sofa",),
    "airplane": ("aeroplane", "plane"),
    "motorcycle": ("motorbike",),
    "cell phone": ("cellphone", "mobile phone", "smartphone"),
    "donut": ("doughnut",),
    "hair drier": ("hair dryer", "hairdryer"),
    "refrigerator": ("fridge",),
    "remote": ("remote control",),
    "traffic light": ("traffic signal",),
    "fire hydrant": ("hydrant",),
    "tennis racket": ("racket", "racquet", "tennis racquet"),
    "wine glass": ("wineglass",),
    "laptop": ("laptop computer",),
    "microwave": ("microwave oven",),
}
"""Synonyms of COCO's categories; other labels have none."""
_WIDER = {
    "animal": ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    "vehicle": ("car", "motorcycle", "bus", "truck"),
    "fruit": ("banana", "apple", "orange"),
    "food": ("banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake"),
    "furniture": ("chair", "couch", "bed", "dining table"),
    "bike": ("bicycle", "motorcycle"),
    "phone": ("cell phone",),
    "table": ("dining table",),
    "plant": ("potted plant",),
    "ball": ("sports ball",),
    "computer": ("laptop",),
}
_NARROWER = {
    "person": words(
        """man woman boy girl child kid baby toddler adult lady guy surfer skier snowboarder skateboarder cyclist
        pedestrian"""
    ),
    "dog": ("puppy",),
    "cat": ("kitten",),
    "sheep": ("lamb",),
}
_PEOPLE = words(
    """actor athlete aunt bride brother chef couple daughter dad doctor driver family farmer father fisherman friend
    gentleman grandfather grandmother groom husband mom mother mum nurse officer parent passenger player policeman
    rider sister soldier son student teacher team uncle waiter waitress wife worker"""
)
"""Further nouns for people in captions: enough of them to avoid rejecting correct counts."""
_PLURALS = {
    "person": ("people", "persons"),
    "man": ("men",),
    "woman": ("women",),
    "child": ("children",),
    "knife": ("knives",),
    "mouse": ("mice",),
    "sheep": ("sheep",),
    "broccoli": ("broccoli",),
    "fruit": ("fruits",),
    "bus": ("buses", "busses"),
    "calf": ("calves",),
    "leaf": ("leaves",),
    "shelf": ("shelves",),
    "fish": ("fish",),
    "deer": ("deer",),
    "goose": ("geese",),
    "foot": ("feet",),
    "wolf": ("wolves",),
    "aircraft": ("aircraft",),
}
_COUPLES = {"couple": 2, "pair": 2, "both": 2, "duo": 2, "twins": 2, "single": 1, "lone": 1, "trio": 3, "dozen": 12}
_REACH = 4
"""Number of tokens after a number that are searched for its noun: `three very large brown dogs` (untuned)."""


@dataclass(frozen=True, slots=True)
class Noun:
    """A noun and the box labels that it covers.

    Attributes:
        labels: Labels that it covers, among those with boxes.
        relation: Relation to these labels.
        plural: Whether the form can be a plural.
        countable: Whether its count can be compared with the boxes; `skis` and `scissors` come in pairs.
    """

    labels: tuple[str, ...]
    relation: Relation
    plural: bool
    countable: bool


def tokens_of(text: str) -> list[str]:
    """Split a text into lower-case words, including inner marks (`dog's`, `10:30`, `2.5`), and single other marks."""
    return _TOKEN.findall(text.lower().replace("\u2019", "'"))


def number_of(token: str) -> int | None:
    """Return an integer written in digits (up to 9,999) or words (up to twenty); else None."""
    if token.isascii() and token.isdigit() and len(token) <= 4:
        return int(token)
    return _NUMBERS.get(token)


def plurals(noun: str) -> tuple[str, ...]:
    """Return the English plurals of a noun, which may consist of several words."""
    start, _, last = noun.rpartition(" ")
    if last in _PLURALS:
        found = _PLURALS[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        found = (f"{last}es",)
    elif last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        found = (f"{last[:-1]}ies",)
    else:
        found = (f"{last}s",)
    return tuple(f"{start} {form}".strip() for form in found)


HUMANS = frozenset(form for name in ("person", *_NARROWER["person"], *_PEOPLE) for form in (name, *plurals(name)))


def same_things(name: str) -> tuple[str, ...]:
    """Return the synonyms of a category, or the category of a synonym and its other synonyms; none for other words."""
    return next(
        ((label, *others) for label, others in _SAME.items() if name == label or name in others),
        (),
    )


@lru_cache(maxsize=4096)
def nouns_of(labels: frozenset[str]) -> dict[str, Noun]:
    """Return every form of every noun for a set of labels.

    Args:
        labels: Labels in lower case.

    Returns:
        Nouns by form, such as `dogs`, `animal` or `traffic lights`.
    """
    found: dict[str, Noun] = {}
    for name, members in _WIDER.items():
        if covered := tuple(sorted(labels.intersection(members))):
            _add(found, name, covered, "wider")
    for relation, table in (("narrower", _NARROWER), ("same", _SAME)):
        for label in sorted(labels):
            for name in table.get(label, ()):
                _add(found, name, (label,), relation)  # type: ignore[arg-type]
    for label in sorted(labels):
        _add(found, label, (label,), "same")
    return found


def _add(found: dict[str, Noun], name: str, labels: tuple[str, ...], relation: Relation) -> None:
    is_pair = name.endswith("s") and not name.endswith(("ss", "us")) and name not in _PLURALS
    forms = () if is_pair else plurals(name)
    found[name] = Noun(labels, relation, plural=is_pair or name in forms, countable=not is_pair)
    for form in forms:
        found[form] = Noun(labels, relation, plural=True, countable=True)


def noun_at(tokens: list[str], place: int, nouns: dict[str, Noun]) -> tuple[str, int] | None:
    """Find the longest known noun that begins at a place.

    Returns:
        Its form and the place after it; None if no noun begins there.
    """
    for end in range(min(len(tokens), place + 3), place, -1):
        if (form := " ".join(tokens[place:end])) in nouns:
            return form, end
    return None


@dataclass(frozen=True, slots=True)
class Known:
    """The counts that a context states of its objects.

    Attributes:
        nouns: Nouns for its labels, by form.
        boxes: Number of boxes by label.
        captions: For each caption its (number, label) pairs; the label is empty if the noun is unknown. The number is
            -1 or -2 for an object that is named in the singular or plural without a number.
    """

    nouns: dict[str, Noun]
    boxes: dict[str, int]
    captions: tuple[tuple[tuple[int, str], ...], ...]

    def count(self, noun: Noun) -> int:
        """Count the boxes that a noun covers."""
        return sum(self.boxes[label] for label in noun.labels)

    def stated(self, noun: Noun) -> set[int]:
        """Return the counts that captions may state for a noun.

        Several numbers for the noun in one caption are summed (`one pizza beside two other pizzas`). A number with an
        unknown noun may count it too (`two huskies`). `A dog` states that there is one, but not that there are no more.
        Only people are summed without numbers (`a man and his wife`), because captions often name other things twice
        (`a dog in a dog bed`).
        """
        found: set[int] = set()
        for caption in self.captions:
            mentions = [number for number, label in caption if label in noun.labels]
            explicit = [number for number in mentions if number > 0]
            others = [number for number, label in caption if not label and number > 1]
            found.update(others)
            if explicit:
                found.add(sum(explicit))
            if "person" in noun.labels and len(mentions) + len(others) > 1:
                found.update((*explicit, sum(map(abs, mentions)) + sum(others)))
        return found

    def most(self, noun: Noun) -> int:
        """Return the largest count that boxes or captions allow."""
        return max(self.count(noun), *self.stated(noun), 0)


def read_context(context: Context) -> Known:
    """Count the objects of a context's boxes and captions.

    Args:
        context: Captions and boxes of one image.

    Returns:
        The counts by label, and those that each caption states.
    """
    boxes: dict[str, int] = {}
    for box in context.boxes:
        label = " ".join(box.label.lower().split())
        boxes[label] = boxes.get(label, 0) + 1
    nouns = nouns_of(frozenset(boxes))
    return Known(nouns, boxes, tuple(tuple(_numbers(tokens_of(caption), nouns)) for caption in context.captions))


def _numbers(tokens: list[str], nouns: dict[str, Noun]) -> Iterator[tuple[int, str]]:
    """Yield the (number, label) pairs of a caption, in the form of `Known.captions`."""
    place, number = 0, None
    reach = 0
    while place < len(tokens):
        token = tokens[place]
        found = noun_at(tokens, place, nouns)
        label = nouns[found[0]].labels[0] if found else "person" if token in HUMANS else None
        if label is not None:
            plural = nouns[found[0]].plural if found else token.endswith("s")
            yield (number, label) if number is not None else (-2 if plural else -1, label)
            number = None
        elif (value := _COUPLES.get(token, number_of(token))) is not None and value:
            if number is not None:
                yield number, ""
            number, reach = value, place + _REACH
        elif number is not None and place >= reach:
            yield number, ""
            number = None
        place = found[1] if found else place + 1
    if number is not None:
        yield number, ""
