"""Sampling settings: temperature, nucleus, length and seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_llava.core.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Settings for choosing the next token, greedy by default.

    Attributes:
        temperature: Divisor of the logits; 0 is greedy.
        top_p: Share of probability of the likeliest tokens to sample from (nucleus sampling).
        max_new_tokens: Most tokens of an answer.
        seed: Seed of sampling; None leaves torch's generator unchanged.

    Raises:
        UserError: For a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature is {self.temperature}; set it to 0 (greedy) or a number up to 100")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; set it to a number above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; set it to 1 or more")

    def as_generate(self) -> dict[str, Any]:
        """Return arguments for transformers' `generate`; greedy search gets None for unused ones, to avoid warnings."""
        if self.temperature == 0:
            return {
                "do_sample": False,
                "temperature": None,
                "top_p": None,
                "top_k": None,
                "max_new_tokens": self.max_new_tokens,
            }
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
            "max_new_tokens": self.max_new_tokens,
        }
