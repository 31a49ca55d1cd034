"""Flavours, tasks and rejections: the types that all parts of the data generation share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_llava.data.conversation import Turn

Flavour = Literal["conversation", "detail", "reasoning"]
FLAVOURS: tuple[Flavour, ...] = ("conversation", "detail", "reasoning")
"""LLaVA's three kinds of responses (arXiv 2304.08485, section 3)."""
WEIGHTS: dict[Flavour, float] = {"conversation": 58, "detail": 23, "reasoning": 77}
"""The mixture of LLaVA-Instruct-158K, in thousands of samples (arXiv 2304.08485, section 3)."""


@dataclass(frozen=True, slots=True)
class Task:
    """One sample to generate.

    Attributes:
        task_id: Unique within a data set and the same in every run: `000000296284-conversation-0`.
        place: Index of its context in the list of contexts.
        flavour: Kind of sample.
        number: Index of the sample among those of the same image and flavour, from 0.
    """

    task_id: str
    place: int
    flavour: Flavour
    number: int


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why an answer was rejected.

    Attributes:
        reason: A key of `lora_llava.synthesis.gates.gates.REASONS`.
        detail: The part of the answer that failed, in a few words.
    """

    reason: str
    detail: str


Turns = tuple[Turn, ...]
"""Alternating turns of `user` and `assistant`, without an image placeholder."""
