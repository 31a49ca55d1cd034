"""What is asked for, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_llava.data.conversation import Turn

Flavour = Literal["conversation", "detail", "reasoning"]
FLAVOURS: tuple[Flavour, ...] = ("conversation", "detail", "reasoning")
"""LLaVA's three kinds of responses (arXiv 2304.08485, section 3)."""
WEIGHTS: dict[Flavour, float] = {"conversation": 58, "detail": 23, "reasoning": 77}
"""LLaVA-Instruct-158K's mixture, in thousands (arXiv 2304.08485, section 3)."""


@dataclass(frozen=True, slots=True)
class Task:
    """One sample to be made.

    Attributes:
        task_id: Tells it from all others of a set, the same in every run: `000000296284-conversation-0`.
        place: Of its context among the contexts.
        flavour: What is to be made.
        number: Of the sample among those of this image and flavour, from 0.
    """

    task_id: str
    place: int
    flavour: Flavour
    number: int


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why an answer is not taken.

    Attributes:
        reason: A key of `lora_llava.synthesis.gates.gates.REASONS`.
        detail: What of the answer it was, in a few words.
    """

    reason: str
    detail: str


Turns = tuple[Turn, ...]
"""Roles `user` and `assistant` in turn, without any mention of the image's place."""
