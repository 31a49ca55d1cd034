"""The names that English has for a context's objects, and the numbers that its captions give of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from lora_llava.synthesis.contexts.context import Context

Relation = Literal["same", "wider", "narrower"]
"""What a noun means beside a label: the very thing, more than it (`animal` beside `dog`), or less (`man` beside
`person`)."""


def words(text: str) -> tuple[str, ...]:
    """A list of words written as one text."""
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
"""Other names of COCO's categories; any other label has its own name alone."""
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
"""Said of people in captions, besides the narrower names: enough not to call a right number wrong."""
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
"""Tokens after a number in which its noun is looked for: `three very large brown dogs` (untuned)."""


@dataclass(frozen=True, slots=True)
class Noun:
    """What a word says of the boxes.

    Attributes:
        labels: The labels that it covers, of those that have boxes.
        relation: How it stands to them.
        plural: Whether its form can be the plural.
        countable: Whether a number of it can be compared with the boxes; `skis` and `scissors` come in pairs.
    """

    labels: tuple[str, ...]
    relation: Relation
    plural: bool
    countable: bool


def tokens_of(text: str) -> list[str]:
    """Words in lower case, with what joins them (`dog's`, `10:30`, `2.5`), and marks one by one."""
    return _TOKEN.findall(text.lower().replace("\u2019", "'"))


def number_of(token: str) -> int | None:
    """A whole number up to 9,999 in digits, or in words up to twenty; else None."""
    if token.isascii() and token.isdigit() and len(token) <= 4:
        return int(token)
    return _NUMBERS.get(token)


def plurals(noun: str) -> tuple[str, ...]:
    """English plurals of a noun, which may be of several words."""
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


_HUMANS = frozenset(form for name in ("person", *_NARROWER["person"], *_PEOPLE) for form in (name, *plurals(name)))


@lru_cache(maxsize=4096)
def nouns_of(labels: frozenset[str]) -> dict[str, Noun]:
    """Every form of every name of some labels.

    Args:
        labels: In lower case.

    Returns:
        From forms such as `dogs`, `animal`, `traffic lights` to what each says.
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
    """The longest known noun that begins at a place.

    Returns:
        Its form and the place after it; None where none begins there.
    """
    for end in range(min(len(tokens), place + 3), place, -1):
        if (form := " ".join(tokens[place:end])) in nouns:
            return form, end
    return None


@dataclass(frozen=True, slots=True)
class Known:
    """What a context says of its objects' numbers.

    Attributes:
        nouns: Of its labels.
        boxes: Number of boxes by label.
        captions: Of each caption the (number, label) that it gives; the label is empty where the noun is unknown.
    """

    nouns: dict[str, Noun]
    boxes: dict[str, int]
    captions: tuple[tuple[tuple[int, str], ...], ...]

    def count(self, noun: Noun) -> int:
        """Boxes that a noun covers."""
        return sum(self.boxes[label] for label in noun.labels)

    def stated(self, noun: Noun) -> set[int]:
        """Numbers that a caption may give of what the noun covers.

        Of several numbers with it in one caption, their sum counts (`one pizza beside two other pizzas`). A number
        whose noun is not known may be about it too (`two huskies`). `A dog` says that there is one, not that there are
        no more; only people are added up without a number (`a man and his wife`), as a caption often says another
        thing's name twice (`a dog in a dog bed`).
        """
        found: set[int] = set()
        for caption in self.captions:
            tied = [number for number, label in caption if label in noun.labels]
            said = [number for number in tied if number > 0]
            others = [number for number, label in caption if not label and number > 1]
            found.update(others)
            if said:
                found.add(sum(said))
            if "person" in noun.labels and len(tied) + len(others) > 1:
                found.update((*said, sum(map(abs, tied)) + sum(others)))
        return found

    def most(self, noun: Noun) -> int:
        """The largest number that boxes or captions allow."""
        return max(self.count(noun), *self.stated(noun), 0)


def read_context(context: Context) -> Known:
    """Bring captions and boxes to numbers.

    Args:
        context: Of one image.

    Returns:
        Boxes by label, and what each caption says; -1 there stands for one that was named without a number.
    """
    boxes: dict[str, int] = {}
    for box in context.boxes:
        label = " ".join(box.label.lower().split())
        boxes[label] = boxes.get(label, 0) + 1
    nouns = nouns_of(frozenset(boxes))
    return Known(nouns, boxes, tuple(tuple(_numbers(tokens_of(caption), nouns)) for caption in context.captions))


def _numbers(tokens: list[str], nouns: dict[str, Noun]) -> Iterator[tuple[int, str]]:
    place, number = 0, None
    reach = 0
    while place < len(tokens):
        token = tokens[place]
        found = noun_at(tokens, place, nouns)
        label = nouns[found[0]].labels[0] if found else "person" if token in _HUMANS else None
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
