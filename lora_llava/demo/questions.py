"""ScienceQA-shaped rows over the demo's world: three subjects, with and without picture, hint and lecture."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_llava.demo import facts
from lora_llava.demo.world import COLOURS, SHAPES, Scene

Row = dict[str, Any]
"""One problem with the fields of ScienceQA's `problems.json`."""

NATURAL, SOCIAL, LANGUAGE = "natural science", "social science", "language science"
NUMBERS = ("one", "two", "three")


def _row(
    rng: random.Random, question: str, right: str, wrong: Sequence[str], solution: str, about: tuple[str, str, str],
    hint: str = "", lecture: str = "", choices: int | None = None,
) -> Row:  # fmt: skip
    """Put the right choice among two to four, in random order, and fill in every field of ScienceQA."""
    subject, topic, skill = about
    count = choices or rng.choices((2, 3, 4), weights=(15, 50, 35))[0]
    options = [right, *rng.sample(list(wrong), min(count - 1, len(wrong)))]
    rng.shuffle(options)
    return {
        "question": question, "choices": options, "answer": options.index(right), "hint": hint, "image": None,
        "task": "closed choice", "grade": f"grade{rng.randint(1, 12)}", "subject": subject, "topic": topic,
        "category": topic, "skill": skill, "lecture": lecture, "solution": solution, "split": "",
    }  # fmt: skip


def _without(items: Sequence[str], *taken: str) -> list[str]:
    return [item for item in items if item not in taken]


# --- questions about a picture -------------------------------------------------------------------------------------


def colour_of(scene: Scene, rng: random.Random) -> Row:
    thing = rng.choice(scene.things)
    question = rng.choice((f"What colour is the {thing.shape}?", f"Which colour does the {thing.shape} have?"))
    about = (NATURAL, "physics", "Name colours")
    return _row(rng, question, thing.colour, _without(list(COLOURS), thing.colour),
                f"The {thing.shape} is {thing.colour}.", about)  # fmt: skip


def shape_of(scene: Scene, rng: random.Random) -> Row:
    thing = rng.choice(scene.things)
    question = rng.choice((f"Which shape is {thing.colour}?", f"What is the {thing.colour} shape?"))
    about = (NATURAL, "geometry", "Name shapes")
    return _row(rng, question, thing.shape, _without(SHAPES, thing.shape),
                f"The {thing.colour} shape is the {thing.shape}.", about)  # fmt: skip


def shape_at(scene: Scene, rng: random.Random) -> Row:
    thing = rng.choice(scene.things)
    about = (NATURAL, "geometry", "Find positions")
    return _row(rng, f"Which shape is at the {thing.where}?", thing.shape, _without(SHAPES, thing.shape),
                f"The shape at the {thing.where} is the {thing.shape}.", about)  # fmt: skip


def colour_at(scene: Scene, rng: random.Random) -> Row:
    thing = rng.choice(scene.things)
    about = (NATURAL, "physics", "Name colours")
    return _row(rng, f"Which colour is at the {thing.where}?", thing.colour, _without(list(COLOURS), thing.colour),
                f"The colour at the {thing.where} is {thing.colour}.", about)  # fmt: skip


def count_of(scene: Scene, rng: random.Random) -> Row:
    count = NUMBERS[len(scene.things) - 1]
    solution = f"There is {caption_list(scene)}." if count == "one" else f"There are {caption_list(scene)}."
    about = (NATURAL, "mathematics", "Count objects")
    return _row(rng, "How many shapes are there?", count, _without(NUMBERS, count), solution, about, choices=3)


def caption_list(scene: Scene) -> str:
    """The scene's things by shape alone: "a star and a ring"."""
    names = [f"a {thing.shape}" for thing in scene.things]
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def property_of(scene: Scene, rng: random.Random) -> Row:
    thing, quality = rng.choice(scene.things), rng.choice(facts.PROPERTIES)
    about = (NATURAL, "physics", "Read a key")
    return _row(rng, f"Which shape is {quality}?", thing.shape, _without(SHAPES, thing.shape),
                f"The {thing.colour} shape is the {thing.shape}.", about,
                hint=f"The {quality} shape is {thing.colour}.")  # fmt: skip


def compass_of(scene: Scene, rng: random.Random) -> Row:
    thing = rng.choice(scene.things)
    direction = facts.COMPASS[thing.place]
    about = (SOCIAL, "geography", "Use a compass rose")
    return _row(rng, f"Which shape is in the {direction} of the map?", thing.shape, _without(SHAPES, thing.shape),
                f"The shape at the {thing.where} is the {thing.shape}.", about,
                lecture="North is at the top of a map.")  # fmt: skip


def building_of(scene: Scene, rng: random.Random) -> Row:
    thing, building = rng.choice(scene.things), rng.choice(facts.BUILDINGS)
    about = (SOCIAL, "geography", "Read a map with a key")
    return _row(rng, f"Which colour does the {building} have on the map?", thing.colour,
                _without(list(COLOURS), thing.colour), f"The {thing.shape} is {thing.colour}.", about,
                hint=f"On this map the {thing.shape} is the {building}.")  # fmt: skip


VISUAL: tuple[Callable[[Scene, random.Random], Row], ...] = (
    colour_of, shape_of, shape_at, colour_at, count_of, property_of, compass_of, building_of,
)  # fmt: skip

# --- questions without a picture -----------------------------------------------------------------------------------


def _member(rng: random.Random, table: Mapping[str, tuple[str, ...]]) -> tuple[str, str, list[str]]:
    """A group, a member of it, and one member of every other group."""
    group = rng.choice(list(table))
    others = [rng.choice(members) for name, members in table.items() if name != group]
    return group, rng.choice(table[group]), others


def animal_class(rng: random.Random) -> Row:
    group, right, wrong = _member(rng, facts.ANIMALS)
    article = "an" if group[0] in "aeiou" else "a"
    return _row(rng, f"Which animal is {article} {group}?", right, wrong, f"The {right} is {article} {group}.",
                (NATURAL, "biology", "Classify animals"), lecture=facts.ANIMAL_LECTURES[group])  # fmt: skip


def continent(rng: random.Random) -> Row:
    group, right, wrong = _member(rng, facts.COUNTRIES)
    return _row(rng, f"Which country is in {group}?", right, wrong, f"{right} is in {group}.",
                (SOCIAL, "geography", "Find countries"))  # fmt: skip


def word_class(rng: random.Random) -> Row:
    group, right, wrong = _member(rng, facts.WORDS)
    article = "an" if group[0] in "aeiou" else "a"
    return _row(rng, f"Which word is {article} {group}?", right, wrong, f"The word {right} is {article} {group}.",
                (LANGUAGE, "grammar", "Identify parts of speech"), lecture=facts.WORD_LECTURES[group])  # fmt: skip


def opposite(rng: random.Random) -> Row:
    pair = rng.choice(facts.OPPOSITES)
    word, right = pair if rng.random() < 0.5 else pair[::-1]
    wrong = [rng.choice(other) for other in facts.OPPOSITES if other is not pair]
    return _row(rng, f"Which word is the opposite of {word}?", right, wrong, f"The opposite of {word} is {right}.",
                (LANGUAGE, "vocabulary", "Choose antonyms"))  # fmt: skip


def magnet(rng: random.Random) -> Row:
    thing = rng.choice(facts.OBJECTS)
    names = rng.sample(facts.NAMES, 2)
    materials = [rng.choice(facts.MATERIALS[True]), rng.choice(facts.MATERIALS[False])]
    owners = list(zip(names, materials, strict=True))
    hint = " ".join(f"{name} has {material}." for name, material in rng.sample(owners, 2))
    return _row(rng, f"A magnet pulls one {thing}. Who has it?", names[0], names[1:],
                f"A magnet pulls {materials[0]}. {names[0]} has {materials[0]}.",
                (NATURAL, "physics", "Identify magnetic materials"), hint=hint, choices=2)  # fmt: skip


def trade(rng: random.Random) -> Row:
    seller, buyer, other = rng.sample(facts.NAMES, 3)
    thing = rng.choice(facts.OBJECTS)
    asks_buyer = rng.random() < 0.5
    role, right, wrong = ("buyer", buyer, seller) if asks_buyer else ("seller", seller, buyer)
    return _row(rng, f"Who is the {role}?", right, [wrong, other], f"{right} is the {role}.",
                (SOCIAL, "economics", "Identify buyers and sellers"),
                hint=f"{seller} sold a {thing} to {buyer}.", choices=3)  # fmt: skip


def word_in_text(rng: random.Random) -> Row:
    noun, verb, adjective = (rng.choice(facts.WORDS[group]) for group in ("noun", "verb", "adjective"))
    group, right = rng.choice((("noun", noun), ("verb", verb), ("adjective", adjective)))
    article = "an" if group[0] in "aeiou" else "a"
    return _row(rng, f"Which word in the text is {article} {group}?", right,
                [word for word in (noun, verb, adjective) if word != right], f"The word {right} is {article} {group}.",
                (LANGUAGE, "grammar", "Find parts of speech"), hint=f"We {verb} near the {adjective} {noun}.",
                choices=3)  # fmt: skip


TEXTUAL: tuple[Callable[[random.Random], Row], ...] = (
    animal_class, continent, word_class, opposite, magnet, trade, word_in_text,
)  # fmt: skip
