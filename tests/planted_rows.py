"""Questions about the demo's world with planted faults: swapped answers, swapped images and copies of images."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lora_llava.demo.questions import NUMBERS, plain_questions
from lora_llava.demo.world import COLOURS, SHAPES, Scene, draw, random_scene


@dataclass(frozen=True)
class PlantedRow:
    """A row of the table; `fault` is "label", "image" or ""."""

    image: int
    question: str
    answer: str
    fault: str = ""


def write_planted(folder: Path, rows: int, labels: float, images: float, seed: int = 0) -> list[PlantedRow]:
    """Write a folder of images and `questions.csv`, with faults.

    Args:
        folder: A new folder.
        rows: At least so many rows; an image has all its questions.
        labels: Share of rows whose answer is swapped with that of another row of the same kind of question.
        images: Share of rows whose image is swapped with that of another row, each answer then being wrong.
        seed: Seed of everything.

    Returns:
        The rows, in the order of the table.
    """
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    scenes, table = list[Scene](), list[PlantedRow]()
    while len(table) < rows:
        scene = random_scene(rng, "train")
        table += [PlantedRow(len(scenes), *pair) for pair in plain_questions(scene)]
        draw(scene, rng).save(folder / "images" / f"{len(scenes):04d}.png")
        scenes.append(scene)

    def swap_answers(one: PlantedRow, two: PlantedRow) -> tuple[PlantedRow, PlantedRow] | None:
        if kind_of(one.answer) != kind_of(two.answer) or one.answer == two.answer:
            return None
        return replace(one, answer=two.answer, fault="label"), replace(two, answer=one.answer, fault="label")

    def swap_images(one: PlantedRow, two: PlantedRow) -> tuple[PlantedRow, PlantedRow] | None:
        swapped = replace(one, image=two.image, fault="image"), replace(two, image=one.image, fault="image")
        right = any((row.question, row.answer) in plain_questions(scenes[row.image]) for row in swapped)
        return None if right else swapped

    _plant(table, round(labels * len(table)), swap_answers, rng)
    _plant(table, round(images * len(table)), swap_images, rng)
    with (folder / "questions.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("image", "question", "answer"))
        writer.writerows((f"{row.image:04d}.png", row.question, row.answer) for row in table)
    return table


def kind_of(answer: str) -> str:
    """Return what an answer names: a colour, a shape or a number."""
    return next(
        name for name, words in (("colour", COLOURS), ("shape", SHAPES), ("number", NUMBERS)) if answer in words
    )


def _plant(
    table: list[PlantedRow],
    count: int,
    change: Callable[[PlantedRow, PlantedRow], tuple[PlantedRow, PlantedRow] | None],
    rng: random.Random,
) -> None:
    """Change pairs of sound rows until `count` rows, rounded down to an even number, have the fault."""
    changed = 0
    while changed < count - 1:
        one, two = rng.sample(range(len(table)), 2)
        found = None if table[one].fault or table[two].fault else change(table[one], table[two])
        if found is not None:
            table[one], table[two] = found
            changed += 2
