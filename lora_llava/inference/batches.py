"""Batches that fit into memory: planned from what is free, and halved where that was too little."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from lora_llava.core.device import first_sentence, free_memory, is_out_of_memory
from lora_llava.core.errors import UserError
from lora_llava.core.progress import print_beside_bars
from lora_llava.model.vision import dtype_of, llava_of
from lora_llava.planning.answer_memory import answer_bytes
from lora_llava.planning.memory import GIB, gpu_share
from lora_llava.planning.memory_budget import available_bytes

Found = TypeVar("Found")


class Batches:
    """Cuts work into batches that fit into memory.

    Args:
        most: Most items of a batch.
        what: Name of the items in messages.
        setting: The setting that shortens an item, named where a single one does not fit.
    """

    def __init__(
        self, most: int, what: str = "questions", setting: str = "lower evaluation.max_new_tokens or data.max_length"
    ) -> None:
        self.most, self.what, self.setting = most, what, setting
        self._reported = False

    @classmethod
    def of(cls, most: int | Batches) -> Batches:
        """Return batches of at most this size, or given ones, which know what fitted before."""
        return most if isinstance(most, Batches) else cls(most)

    def run(
        self,
        items: Sequence[int],
        work: Callable[[list[int]], Found],
        item_bytes: Callable[[int], int] | None = None,
    ) -> Iterator[tuple[list[int], Found]]:
        """Do work in batches, and again in batches of half the size where memory runs out.

        Args:
            items: The items, largest first.
            work: Does a batch. It may be called again with a part of the same items.
            item_bytes: Returns the bytes that an item needs; None plans nothing.

        Yields:
            The items of a batch, and what `work` returns.

        Raises:
            UserError: If a single item does not fit.
        """
        left = list(items)
        while left:
            chosen = left[: self._planned(item_bytes(left[0])) if item_bytes is not None else self.most]
            try:
                found = work(chosen)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_sentence(error)
            else:
                yield chosen, found
                left = left[len(chosen) :]
                continue
            # Out of the except block, whose error keeps the tensors of the failed pass.
            self._halve(len(chosen), reason)

    def _planned(self, each: int) -> int:
        """Return how many items of this size fit, and report it once if they are fewer than wanted."""
        free = free_bytes()
        fitting = max(1, min(self.most, int(free // max(1, each))))
        if fitting < self.most and not self._reported:
            self._reported = True
            print_beside_bars(
                f"{self.most} {self.what} at once would need {self.most * each / GIB:.1f} GiB, and {free / GIB:.1f} "
                f"GiB are free: {fitting} at once"
            )
        return fitting

    def _halve(self, size: int, reason: str) -> None:
        free_memory()
        if size == 1:
            raise UserError(
                f"memory is full with 1 of the {self.what} at once ({reason}); stop other programs that use it, or "
                f"{self.setting}"
            )
        self.most = size // 2
        print_beside_bars(f"memory ran out with {size} {self.what} at once: {self.most} at once from now on")


def free_bytes() -> int:
    """Return the bytes that tensors can still take: on the GPU with torch's free blocks, within its limit."""
    if not torch.cuda.is_available():
        return available_bytes()
    free, total = torch.cuda.mem_get_info()
    allocated = torch.cuda.memory_allocated()
    limit = int(torch.cuda.get_per_process_memory_fraction() * total)
    return int(gpu_share() * min(free + torch.cuda.memory_reserved() - allocated, limit - allocated))


def question_bytes(
    model: Any, tokens: int, *, new_tokens: int = 0, logits: int = 1, cached: bool = True, all_states: bool = False
) -> int:
    """Return the bytes that one row of a batch needs besides the weights; see `answer_bytes`.

    Args:
        model: A LLaVA, with or without an adapter.
        tokens: Tokens of the prompt.
        new_tokens: Most tokens of the answer.
        logits: Positions whose logits are computed.
        cached: Whether keys and values are kept, as generation does.
        all_states: Whether the states after every layer are kept.
    """
    llava = llava_of(model)
    return answer_bytes(
        llava.config.text_config,
        dtype_of(llava).itemsize,
        tokens,
        new_tokens=new_tokens,
        logits=logits,
        cached=cached,
        all_states=all_states,
        adapter=hasattr(model, "peft_config"),
    )
