"""The answers of a server beside those of the model here, counted by kind of question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_llava.inference.served.prompt_pairs import PromptPair
from lora_llava.publishing.verify.asked_questions import KINDS, AskedQuestion
from lora_llava.publishing.verify.served_answers import ServedAnswer


@dataclass(frozen=True)
class ComparedAnswer:
    """One question, answered here and by a server.

    Attributes:
        question: The question.
        here: The answer of the model here.
        served: What the server made of it.
        prompt: Its prompt here and there.
    """

    question: AskedQuestion
    here: str
    served: ServedAnswer
    prompt: PromptPair

    @property
    def equal(self) -> bool:
        """Whether the answers are equal; one that the server did not give is not."""
        return self.served.text == self.here

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        found = self.served.found
        return {
            "question": self.question.name,
            "kind": self.question.kind,
            "here": self.here,
            "server": self.served.text,
            "problem": getattr(found, "reason", None),
            "prompt_tokens_here": len(self.prompt.ours),
            "prompt_tokens_server": self.prompt.count or None,
            "prompt_ids_equal": None if self.prompt.theirs is None else list(self.prompt.theirs) == self.prompt.ours,
        }


def count_table(compared: Sequence[ComparedAnswer]) -> dict[str, dict[str, tuple[int, int] | None]]:
    """Count what is equal.

    Args:
        compared: The questions.

    Returns:
        By line and column (a kind of question, or `all`) the number of equal ones and of those that are known; None
        where none is known.
    """
    groups: dict[str, Sequence[ComparedAnswer]] = {}
    for kind in KINDS:
        if some := [one for one in compared if one.question.kind == kind]:
            groups[str(kind)] = some
    groups["all"] = compared
    return {
        name: {column: _count(test(one) for one in some) for column, some in groups.items()}
        for name, test in _LINES.items()
    }


def _count(found: Any) -> tuple[int, int] | None:
    known = [value for value in found if value is not None]
    return (sum(known), len(known)) if known else None


def _counts_equal(one: ComparedAnswer) -> bool | None:
    return one.prompt.count == len(one.prompt.ours) if one.prompt.count else None


def _ids_equal(one: ComparedAnswer) -> bool | None:
    return None if one.prompt.theirs is None else list(one.prompt.theirs) == list(one.prompt.ours)


def _right(one: ComparedAnswer, text: str | None) -> bool | None:
    return None if one.question.is_right is None else text is not None and one.question.is_right(text)


_LINES: dict[str, Any] = {
    "prompt tokens equal": _counts_equal,
    "prompt ids equal": _ids_equal,
    "answers equal": lambda one: one.equal,
    "right here": lambda one: _right(one, one.here),
    "right on the server": lambda one: _right(one, one.served.text),
}
