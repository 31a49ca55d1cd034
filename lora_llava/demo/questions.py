"""ScienceQA-like questions about the demo's world: three subjects, with and without image, hint and lecture.

Choices have a fixed order, so that a choice has the same letter in every row, which a language model of a million
parameters can learn in minutes. The correct choice cannot be inferred from the question alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from lora_llava.demo import facts
from lora_llava.demo.world import COLOURS, SHAPES, Scene

Row = dict[str, Any]
"""One problem with the fields of ScienceQA's `problems.json`."""

NATURAL, SOCIAL, LANGUAGE = "natural science", "social science", "language science"
NUMBERS = ("one", "two", "three")


def _row(
    rng: random.Random,
    question: str,
    choices: Sequence[str],
    right: str,
    solution: str,
    about: tuple[str, str, str],
    hint: str = "",
    lecture: str = "",
) -> Row:
    """Return a row with every field of ScienceQA."""
    subject, topic, skill = about
    return {
        "question": question,
        "choices": list(choices),
        "answer": list(choices).index(right),
        "hint": hint,
        "image": None,
        "task": "closed choice",
        "grade": f"grade{rng.randint(1, 12)}",
        "subject": subject,
        "topic": topic,
        "category": topic,
        "skill": skill,
        "lecture": lecture,
        "solution": solution,
        "split": "",
    }


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


# --- questions about an image -------------------------------------------------------------------------------------


def colour_of(scene: Scene, rng: random.Random) -> Row:
    thing = rng.choice(scene.things)
    question = rng.choice((f"What colour is the {thing.shape}?", f"Which colour does the {thing.shape} have?"))
    about = (NATURAL, "physics", "Name colours")
    return _row(rng, question, tuple(COLOURS), thing.colour, f"The {thing.shape} is {thing.colour}.", about)


def shape_of(scene: Scene, rng: random.Random) -> Row:
    thing = rng.choice(scene.things)
    question = rng.choice((f"Which shape is {thing.colour}?", f"What is the {thing.colour} shape?"))
    about = (NATURAL, "geometry", "Name shapes")
    return _row(rng, question, SHAPES, thing.shape, f"The {thing.colour} shape is the {thing.shape}.", about)


def shape_at(scene: Scene, rng: random.Random) -> Row:
    thing = rng.choice(scene.things)
    solution = f"The shape at the {thing.where} is the {thing.shape}."
    about = (NATURAL, "geometry", "Find positions")
    return _row(rng, f"Which shape is at the {thing.where}?", SHAPES, thing.shape, solution, about)


def colour_at(scene: Scene, rng: random.Random) -> Row:
    thing = rng.choice(scene.things)
    solution = f"The colour at the {thing.where} is {thing.colour}."
    about = (NATURAL, "physics", "Name colours")
    return _row(rng, f"Which colour is at the {thing.where}?", tuple(COLOURS), thing.colour, solution, about)


def count_of(scene: Scene, rng: random.Random) -> Row:
    names = [f"a {thing.shape}" for thing in scene.things]
    listed = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    solution = f"There {'are' if len(names) > 1 else 'is'} {listed}."
    about = (NATURAL, "mathematics", "Count objects")
    return _row(rng, "How many shapes are there?", NUMBERS, NUMBERS[len(names) - 1], solution, about)


def property_of(scene: Scene, rng: random.Random) -> Row:
    thing, quality = rng.choice(scene.things), rng.choice(facts.PROPERTIES)
    solution = f"The {thing.colour} shape is the {thing.shape}."
    about = (NATURAL, "physics", "Read a key")
    hint = f"The {quality} shape is {thing.colour}."
    return _row(rng, f"Which shape is {quality}?", SHAPES, thing.shape, solution, about, hint)


def compass_of(scene: Scene, rng: random.Random) -> Row:
    thing = rng.choice(scene.things)
    question = f"Which shape is in the {facts.COMPASS[thing.place]} of the map?"
    solution = f"The shape at the {thing.where} is the {thing.shape}."
    about = (SOCIAL, "geography", "Use a compass rose")
    return _row(rng, question, SHAPES, thing.shape, solution, about, lecture="North is at the top of a map.")


def building_of(scene: Scene, rng: random.Random) -> Row:
    thing, building = rng.choice(scene.things), rng.choice(facts.BUILDINGS)
    question = f"Which colour does the {building} have on the map?"
    about = (SOCIAL, "geography", "Read a map with a key")
    hint = f"On this map the {thing.shape} is the {building}."
    return _row(rng, question, tuple(COLOURS), thing.colour, f"The {thing.shape} is {thing.colour}.", about, hint)


VISUAL: tuple[Callable[[Scene, random.Random], Row], ...] = (
    colour_of,
    shape_of,
    shape_at,
    colour_at,
    count_of,
    property_of,
    compass_of,
    building_of,
)


def plain_questions(scene: Scene) -> list[tuple[str, str]]:
    """Return questions and short answers about a scene, as a person would write them into a table."""
    pairs = [("How many shapes are there?", NUMBERS[len(scene.things) - 1])]
    for thing in scene.things:
        pairs.append((f"What colour is the {thing.shape}?", thing.colour))
        pairs.append((f"Which shape is at the {thing.where}?", thing.shape))
    return pairs


# --- questions without an image -----------------------------------------------------------------------------------


def animal_class(rng: random.Random) -> Row:
    group = rng.choice(list(facts.ANIMALS))
    animal, adjective = rng.choice(facts.ANIMALS[group]), rng.choice(facts.WORDS["adjective"] + facts.QUALITIES)
    question = f"What kind of animal is {_a(adjective)} {animal}?"
    about = (NATURAL, "biology", "Classify animals")
    solution = f"The {animal} is {_a(group)}."
    return _row(rng, question, tuple(facts.ANIMALS), group, solution, about, lecture=facts.ANIMAL_LECTURES[group])


def continent(rng: random.Random) -> Row:
    group, name = rng.choice(list(facts.COUNTRIES)), rng.choice(facts.NAMES)
    country = rng.choice(facts.COUNTRIES[group])
    question = f"{name} {rng.choice(('lives', 'works'))} in {country}. On which continent is that?"
    about = (SOCIAL, "geography", "Find countries")
    return _row(rng, question, tuple(facts.COUNTRIES), group, f"{country} is in {group}.", about)


def word_class(rng: random.Random) -> Row:
    group, name = rng.choice(list(facts.WORDS)), rng.choice(facts.NAMES)
    word = rng.choice(facts.WORDS[group])
    question = f"{name} {rng.choice(('reads', 'writes'))} {word}. Which kind of word is it?"
    about = (LANGUAGE, "grammar", "Identify parts of speech")
    solution = f"The word {word} is {_a(group)}."
    return _row(rng, question, tuple(facts.WORDS), group, solution, about, lecture=facts.WORD_LECTURES[group])


def sentence_kind(rng: random.Random) -> Row:
    kind = rng.choice(list(facts.SENTENCES))
    words = {group: rng.choice(facts.WORDS[group]) for group in facts.WORDS}
    about = (LANGUAGE, "grammar", "Identify kinds of sentences")
    question, solution = "Which kind of sentence is this?", f"The sentence is a {kind}."
    hint = facts.SENTENCES[kind].format(**words)
    return _row(rng, question, tuple(facts.SENTENCES), kind, solution, about, hint)


def magnet(rng: random.Random) -> Row:
    pulled = rng.random() < 0.5
    name, thing, material = rng.choice(facts.NAMES), rng.choice(facts.OBJECTS), rng.choice(facts.MATERIALS[pulled])
    solution = f"It is {material}. A magnet {'pulls' if pulled else 'does not pull'} it."
    about = (NATURAL, "physics", "Identify magnetic materials")
    hint = f"{name} has a {thing} of {material}."
    return _row(rng, "Does a magnet pull it?", ("yes", "no"), "yes" if pulled else "no", solution, about, hint)


def trade(rng: random.Random) -> Row:
    name, thing = rng.choice(facts.NAMES), rng.choice(facts.OBJECTS)
    role, verb = rng.choice((("buyer", "bought"), ("seller", "sold")))
    about = (SOCIAL, "economics", "Identify buyers and sellers")
    hint = f"{name} {verb} {rng.choice(('a', 'one', 'the'))} {rng.choice(('new', *facts.QUALITIES))} {thing}."
    return _row(rng, f"What is {name}?", ("buyer", "seller"), role, f"{name} is the {role}.", about, hint)


TEXTUAL: tuple[Callable[[random.Random], Row], ...] = (
    animal_class,
    continent,
    word_class,
    sentence_kind,
    magnet,
    trade,
)
