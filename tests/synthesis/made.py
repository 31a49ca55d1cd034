"""Recipes of small data sets, and the answers of a teacher on the loopback interface."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from inference.chat_server import Body, ChatLog

from lora_llava.recipe import dump_recipe
from lora_llava.recipe.generate_schema import ContextsSection, GatesSection, GenerateRecipe, TeacherSection
from lora_llava.synthesis.generation import LEDGER_FILE

ANIMALS = ("dog", "cat", "horse", "sheep", "bird", "cow", "zebra", "bear")


def write_contexts(file: Path, count: int) -> Path:
    """Write contexts of `count` images, each with an animal, and a ball at a different place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": str(n),
            "image": f"{n:03}.jpg",
            "captions": [f"A {ANIMALS[n % 8]} near ball {n}."],
            "instances": [
                {"category": ANIMALS[n % 8], "bbox": [0.1, 0.2, 0.3, 0.4]},
                {"category": "sports ball", "bbox": [0.5, 0.001 * n, 0.6, 0.5]},
            ],
        }
        for n in range(count)
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def recipe_of(folder: Path, url: str, count: int, **more: Any) -> GenerateRecipe:
    """Return a recipe for one sample per image from a server; the contexts are next to the folder, to be shared."""
    teacher = {"url": url, "model": "judge", "concurrency": 4, "timeout": 20.0, "retries": 3, **more.pop("teacher", {})}
    return GenerateRecipe(
        output_dir=str(folder / "set"),
        contexts=ContextsSection(contexts=str(write_contexts(folder.parent / "contexts.jsonl", count))),
        teacher=TeacherSection(**teacher),
        gates=GatesSection(**more.pop("gates", {})),
        **more,
    )


def write_recipe(recipe: GenerateRecipe, folder: Path) -> str:
    file = folder / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    return str(file)


def number_of(body: Body) -> int:
    """Return the number of the image in a request."""
    return int(re.findall(r"near ball (\d+)\.", body["messages"][-1]["content"])[-1])


def teach(body: Body) -> str:
    """Return a correct answer in the requested form, the same for equal requests."""
    number = number_of(body)
    animal = ANIMALS[number % 8]
    kind = body["response_format"]["json_schema"]["schema"]["properties"] if "response_format" in body else {"turns": 1}
    if "description" in kind:
        text = (
            f"A {animal} stands on the left of a wide green meadow, close to ball {number}, which lies further to the "
            "right, while the grass around both of them is short and dry."
        )
        return json.dumps({"description": text})
    if "question" in kind:
        answer = f"The {animal} is near ball {number}, so it is likely to play with it, as animals like it often do."
        return json.dumps({"question": f"Why might the {animal} be near ball {number}?", "answer": answer})
    turns = [
        {"question": "Which animal is shown?", "answer": f"It is a {animal}, near ball {number}."},
        {"question": "What lies near it?", "answer": f"Ball {number} lies near the {animal}."},
    ]
    return json.dumps({"turns": turns})


def seen(log: ChatLog) -> list[int]:
    """Return how often each request was answered completely."""
    return sorted(log.answered.values())


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a set, except the ledger, whose times differ, and the recipe, which names its folder."""
    skipped = (LEDGER_FILE, "recipe.yaml")
    return {
        file.name: file.read_bytes()
        for file in sorted((folder / "set").iterdir())
        if not file.name.startswith(skipped) and file.is_file()
    }
