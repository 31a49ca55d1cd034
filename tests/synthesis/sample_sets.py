"""Results of a small data set, and helpers that write its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_llava.data.conversation import Turn
from lora_llava.recipe.generate_schema import ContextsSection, GenerateRecipe, TeacherSection
from lora_llava.synthesis.contexts.context_builder import ContextReport
from lora_llava.synthesis.contexts.reading_contexts import Contexts
from lora_llava.synthesis.output import write_set
from lora_llava.synthesis.pipeline import Result
from lora_llava.synthesis.sample import Flavour, Rejection, Task

DEMO = TeacherSection(backend="demo")
SERVER = TeacherSection(url="http://localhost:8000/v1", model="owner/model")


def contexts(count: int = 4) -> Contexts:
    known = json.dumps([["A dog."], [["dog", 0.1, 0.2, 0.5, 0.6]]]).encode()
    report = ContextReport(images=count, captions=count, boxes=count)
    return Contexts({f"{number}.jpg": known for number in range(count)}, report)


def recipe(teacher: TeacherSection = SERVER, **section: Any) -> GenerateRecipe:
    return GenerateRecipe(
        output_dir="x", contexts=ContextsSection(**({"contexts": "c.jsonl"} | section)), teacher=teacher
    )


def task(place: int, flavour: Flavour = "conversation") -> Task:
    return Task(f"{place}-{flavour}-0", place, flavour, 0)


def turns(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts))


def rejections(*reasons: str) -> tuple[Rejection, ...]:
    return tuple(Rejection(reason, f"about {reason}") for reason in reasons)


RESULTS = [
    Result(
        task(0), "accepted", turns("What?", "A dog.", "Where, then?", "On the left"), rejections("cut off"), model="m"
    ),
    Result(task(0, "detail"), "accepted", turns("Describe it.", "Ein Hündchen \u2028 «links»."), model="m"),
    Result(
        task(1), "accepted", turns("what", "a DOG!", "Where then?", "On the  left."), rejections("too short"), model="m"
    ),
    Result(task(1, "reasoning"), "rejected", rejections=rejections("cut off", "no answer", "cut off"), model="m"),
    Result(task(2, "reasoning"), "failed", reason="HTTP 500"),
    Result(task(3), "not asked"),
]


def write(folder: Path, results: Any = RESULTS, teacher: TeacherSection = SERVER, **about: Any) -> dict[str, Any]:
    return write_set(folder, results=results, contexts=contexts(), recipe=recipe(teacher), about=about)
