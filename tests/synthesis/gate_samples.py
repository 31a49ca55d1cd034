"""Contexts with good and bad samples for the gates, all written for these tests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_llava.data.conversation import Turn
from lora_llava.synthesis.contexts.context import Box, Context
from lora_llava.synthesis.gates.gate_nouns import plurals
from lora_llava.synthesis.sample import Flavour, Turns

HERE = Path(__file__).parent
OPENING = ("What is the weather like?", "It looks dry and bright enough.")
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def context_of(row: dict[str, Any]) -> Context:
    boxes = (Box(label, tuple(corners)) for label, found in row["boxes"].items() for corners in found)
    return Context(f"{row['name']}.jpg", tuple(row["captions"]), tuple(boxes))


CONTEXTS = {row["name"]: context_of(row) for row in rows("gate_contexts.jsonl")}


def turns_of(*texts: str) -> Turns:
    return tuple(Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(texts))


def written_samples() -> Iterator[tuple[Context, Turns, Flavour]]:
    """Yield good samples that were written by hand."""
    for row in rows("good_samples.jsonl"):
        yield CONTEXTS[row["context"]], turns_of(*row["turns"]), row["flavour"]
    for row in rows("good_answers.jsonl"):
        yield CONTEXTS[row["context"]], turns_of(*OPENING, row["question"], row["answer"]), "conversation"


def box_samples() -> Iterator[tuple[Context, Turns, Flavour]]:
    """Yield conversations that agree with the boxes, one for each label of each context."""
    for context in CONTEXTS.values():
        for label, count in Counter(box.label for box in context.boxes).items():
            many = label if label == "skis" else plurals(label)[0]
            number, are = NUMBERS[count], "is" if count == 1 else "are"
            named = label if count == 1 else many
            yield (
                context,
                turns_of(
                    f"How many {many} are there in the image?",
                    f"There {are} {number} {named}.",
                    f"Are there any other {many} on the roof?",
                    f"No, there are no {many} on the roof.",
                    f"Is there a {label}?",
                    f"Yes, {number} {named} can be seen.",
                ),
                "conversation",
            )


def bad_answers() -> dict[str, list[tuple[Context, Turns]]]:
    """Return bad answers by the reason for which they must be rejected."""
    found: dict[str, list[tuple[Context, Turns]]] = {}
    for row in rows("bad_answers.jsonl"):
        turns = turns_of(*OPENING, row["question"], row["answer"])
        found.setdefault(row["reason"], []).append((CONTEXTS[row["context"]], turns))
    return found
