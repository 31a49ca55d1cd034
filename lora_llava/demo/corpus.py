"""Pre-training corpus of the demo's language model: questions about scenes in written form, and word games.

It contains no image and no image token. The words of the demo's text-only questions (`facts.ANIMALS` and so on) occur
in it, but not the facts that the questions ask for.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from lora_llava.data.scienceqa import format_problem
from lora_llava.demo import facts, questions
from lora_llava.demo.world import COLOURS, PLACES, SHAPES, Scene, caption, random_scene

GRID = 4
"""Side of a written grid in words: 4 x 4, like the 4 x 4 patches of an image."""
DESCRIBE = ("Describe the picture.", "What is shown?", "Give a brief description.")


class Text(NamedTuple):
    """A prompt and its continuation; a conversation is a list of them."""

    prompt: str
    answer: str


def written_grid(scene: Scene) -> str:
    """Write a scene as 16 words in reading order, with a compound word such as `redstar` in each cell of a thing."""
    cells = ["."] * (GRID * GRID)
    for thing in scene.things:
        row, column = divmod(thing.place, 2)
        for line in (2 * row, 2 * row + 1):
            start = line * GRID + 2 * column
            cells[start : start + 2] = [thing.colour + thing.shape] * 2
    return " ".join(cells)


def written_scene(scene: Scene, rng: random.Random) -> str:
    """Write a scene as text: usually as a grid, else as its caption or as a list."""
    draw = rng.random()
    if draw < 0.8:
        return written_grid(scene)
    if draw < 0.95:
        return caption(scene)
    things = rng.sample(scene.things, len(scene.things))
    return ", ".join(f"{t.where} {t.colour} {t.shape}" for t in things)


def chat(user: str, answer: str) -> Text:
    """Write one turn in the form of the template `vicuna_v1`, without its system text."""
    return Text(f"USER: {user} ASSISTANT:", f" {answer}</s>")


def _scene_question(scene: Scene, rng: random.Random) -> list[Text]:
    # Questions about shapes at places are learnt last, so they occur more often.
    ask = rng.choice((*questions.VISUAL, questions.shape_at, questions.compass_of))
    prompt, answer = format_problem(ask(scene, rng), "QCM-LEA")
    return [chat(f"{written_scene(scene, rng)}\n{prompt}", answer)]


def _description(scene: Scene, rng: random.Random) -> list[Text]:
    if rng.random() < 0.5:
        return [Text(written_grid(scene), f" {caption(scene)}\n")]
    return [chat(f"{written_scene(scene, rng)}\n{rng.choice(DESCRIBE)}", caption(scene))]


def all_words() -> list[str]:
    """Return every content word of the demo's questions."""
    groups = [*facts.ANIMALS.values(), *facts.COUNTRIES.values(), *facts.WORDS.values(), *facts.MATERIALS.values()]
    groups += [facts.OBJECTS, facts.QUALITIES, tuple(facts.ANIMALS), tuple(facts.WORDS), tuple(facts.SENTENCES)]
    return [word for group in groups for word in group]


_GAME_WORDS = (*COLOURS, *SHAPES, *facts.NAMES, *all_words())


def _who_says_it(rng: random.Random) -> list[Text]:
    """Draw a word game that trains reading a context and covers every word."""
    names, words = rng.sample(facts.NAMES, 2), rng.sample(all_words(), 2)
    pairs = list(zip(names, words, strict=True))
    hint = " ".join(f"{name} says {word}." for name, word in pairs)
    turns = []
    for number, (name, word) in enumerate(rng.sample(pairs, 2)):
        question = rng.choice((f"Who says {word}?", f"What does {name} say?"))
        turns.append(chat(f"{hint}\n{question}" if number == 0 else question, f"{name} says {word}."))
    return turns


def _repetition(rng: random.Random) -> list[Text]:
    """Draw a copying task, the simplest use of attention and the first that is learnt."""
    words = [rng.choice(_GAME_WORDS) for _ in range(rng.randint(4, 20))]
    return [chat(f"{' '.join(words)}\nRepeat this.", " ".join(words))]


def random_text(rng: random.Random) -> list[Text]:
    """Draw one text of the corpus: a conversation's turns."""
    draw = rng.random()
    if draw < 0.6:
        return _scene_question(random_scene(rng, "train"), rng)
    if draw < 0.85:
        return _description(random_scene(rng, "train"), rng)
    return _who_says_it(rng) if draw < 0.95 else _repetition(rng)


def tokenizer_texts(count: int, seed: int) -> list[str]:
    """Return texts for training the tokenizer: the corpus and the demo's questions, so that every word is one token."""
    rng = random.Random(seed)
    texts = ["".join("".join(turn) for turn in random_text(rng)) for _ in range(count)]
    rows = [rng.choice(questions.TEXTUAL)(rng) for _ in range(count)]
    texts += ["\n".join(format_problem(row, "QCM-LEA")) for row in rows]
    compounds = [colour + shape for colour in COLOURS for shape in SHAPES]
    words = [*PLACES, *facts.PROPERTIES, *facts.BUILDINGS, *facts.COUNTRIES, *_GAME_WORDS, *compounds]
    return texts + [" ".join(words)] * 400
