"""Compare a server's prompts with those of the model here: BOS, template, image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PromptFault = Literal["missing BOS", "doubled BOS", "image tokens", "template replaced"]


@dataclass(frozen=True)
class PromptPair:
    """The prompt of one question here and on a server.

    Attributes:
        ours: Its ids here, image tokens expanded.
        images: Number of its images.
        count: The server's count of its tokens; 0 if unknown.
        theirs: Its ids on the server; None if unknown.
    """

    ours: Sequence[int]
    images: int
    count: int
    theirs: Sequence[int] | None = None

    @property
    def difference(self) -> int | None:
        """Tokens that the server's prompt has more; None if unknown."""
        if self.count:
            return self.count - len(self.ours)
        return None if self.theirs is None else len(self.theirs) - len(self.ours)

    @property
    def equal(self) -> bool | None:
        """Whether ids, or else counts, are equal; None if neither is known."""
        if self.theirs is not None:
            return list(self.theirs) == list(self.ours) and not self.difference
        return None if self.difference is None else self.difference == 0


def prompt_fault(pairs: Sequence[PromptPair], bos: Sequence[int], image_id: int | None) -> PromptFault | None:
    """Name the fault that explains how a server's prompts differ.

    Args:
        pairs: The prompts of all questions.
        bos: Ids that the tokenizer puts in front of a text; empty if it has no BOS.
        image_id: Id of `<image>`.

    Returns:
        None if all known prompts are equal.
    """
    unequal = [pair for pair in pairs if pair.equal is False]
    if not unequal:
        return None
    if bos and all(_is_cut(pair, len(bos)) for pair in pairs):
        return "missing BOS"
    if bos and all(_is_doubled(pair, list(bos)) for pair in pairs):
        return "doubled BOS"
    if all(pair.images and _same_text(pair, image_id) for pair in unequal):
        return "image tokens"
    return "template replaced"


def _is_cut(pair: PromptPair, bos: int) -> bool:
    if pair.theirs is not None:
        return list(pair.theirs) == list(pair.ours)[bos:]
    return pair.difference in (None, -bos)


def _is_doubled(pair: PromptPair, bos: list[int]) -> bool:
    if pair.theirs is not None:
        return list(pair.theirs) == bos + list(pair.ours)
    return pair.difference in (None, len(bos))


def _same_text(pair: PromptPair, image_id: int | None) -> bool:
    if pair.theirs is None:
        return True
    return [i for i in pair.theirs if i != image_id] == [i for i in pair.ours if i != image_id]


def first_difference(pair: PromptPair) -> int:
    """Return the position of the first id that differs."""
    both = zip(pair.ours, pair.theirs or (), strict=False)
    return next((place for place, (ours, theirs) in enumerate(both) if ours != theirs), len(pair.ours))
