"""Batches that fit into memory: planned from what is free, and halved where that was too little."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from lora_llava.core.device import first_sentence, is_out_of_memory
from lora_llava.core.errors import UserError
from lora_llava.core.progress import print_beside_bars
from lora_llava.model.families.decoder_shape import attention_widths
from lora_llava.model.vision import llava_of
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
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
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
    """Return the bytes that one row of a batch needs besides the weights.

    Args:
        model: A LLaVA, with or without an adapter.
        tokens: Tokens of the prompt.
        new_tokens: Most tokens of the answer.
        logits: Positions whose logits are computed.
        cached: Whether keys and values are kept, as generation does.
        all_states: Whether the states after every layer are kept.

    Returns:
        The larger of the bytes of the first pass over the prompt, and of the last step, if the answer is as long as
        it may be. A 7B model in bfloat16 keeps 512 KiB of keys and values per token: 32 layers x 2 x 4,096 x 2 bytes.
    """
    llava = llava_of(model)
    text, size = llava.config.text_config, llava.dtype.itemsize
    _, keys = attention_widths(text)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    # The states of the layer, its queries, keys, values and output, the MLP's three products, and with adapters in
    # float32 their output before and after it is scaled (peft/tuners/lora/bnb.py, Linear4bit.forward).
    adapters = 2 * 4 * inner if hasattr(model, "peft_config") else 0
    per_token = size * (5 * text.hidden_size + 3 * inner) + adapters
    head = logits * text.vocab_size * (size + 2 * 4)  # logits, in float32, and their log-softmax
    first = tokens * per_token + tokens * tokens * (1 + size) + head  # with the mask, and its copy in the scores' dtype
    if all_states:
        first += tokens * (text.num_hidden_layers + 1) * text.hidden_size * size
    if not cached:
        return int(first)
    kept = 2 * text.num_hidden_layers * keys * size
    largest = tokens + new_tokens
    # A step copies the keys or the values of one layer to add those of one token (transformers, DynamicCache).
    last = kept * largest + keys * size * largest + per_token + head
    return int(max(kept * tokens + first, last))
