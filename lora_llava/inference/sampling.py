"""How the next token is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_llava.core.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Greedy by default.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Draws among the likeliest tokens that together have this share.
        max_new_tokens: Longest answer.
        seed: Of what is drawn; None leaves torch's generator as it is.

    Raises:
        UserError: For a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature is {self.temperature}; give 0 (greedy) or a number up to 100")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; give a share above 0, at most 1")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; give 1 or more")

    def as_generate(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`; what greedy search does not use is None, which it takes in silence."""
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
