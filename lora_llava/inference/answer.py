"""The answer to one question."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """One answer, or the reason why there is none.

    Attributes:
        text: The generated text without special tokens; "" if empty or missing.
        problem: Why there is no answer; None if there is one.
        is_image: Whether the problem is an image that cannot be opened, rather than the model or server.
        scores: Log-likelihood of each choice in nats, if choices were scored instead of generating text.
    """

    text: str
    problem: str | None = None
    is_image: bool = False
    scores: tuple[float, ...] | None = None

    @property
    def choice(self) -> int | None:
        """Index of the likeliest choice, the first on a tie; None if no choices were scored."""
        return None if self.scores is None else max(range(len(self.scores)), key=self.scores.__getitem__)
