"""What comes back for a question."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: What was written, without special tokens; "" where nothing was.
        problem: Why there is no answer; None where there is one.
        is_image: Whether the problem is an image that cannot be opened, and not who was asked.
        scores: Log-likelihood of each choice in nats, where choices were weighed in place of writing.
    """

    text: str
    problem: str | None = None
    is_image: bool = False
    scores: tuple[float, ...] | None = None

    @property
    def choice(self) -> int | None:
        """Index of the likeliest choice, the first of equals; None where none were weighed."""
        return None if self.scores is None else max(range(len(self.scores)), key=self.scores.__getitem__)
