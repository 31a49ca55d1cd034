"""Batched greedy answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lora_llava.data.images import Pictures


@dataclass(frozen=True)
class Question:
    """One prompt.

    Attributes:
        input_ids: Ids up to where the answer starts, image tokens expanded.
        image_files: Names of its pictures, in order.
    """

    input_ids: Sequence[int]
    image_files: Sequence[str] = ()


@torch.inference_mode()
def generate_answers(
    model: Any,
    questions: Sequence[Question],
    *,
    tokenizer: PreTrainedTokenizerBase,
    pictures: Pictures,
    batch_size: int,
    max_new_tokens: int,
    stop_string: str | None = None,
) -> Iterator[tuple[int, str]]:
    """Answer questions greedily, longest first, and give each batch's answers as they come.

    Args:
        model: A LLaVA, with or without adapter.
        questions: What to ask.
        tokenizer: The processor's; it pads on the left here.
        pictures: Gives the pictures that questions name.
        batch_size: Questions at once.
        max_new_tokens: Longest answer.
        stop_string: Ends an answer where the template's stop is ordinary text; taken off the answer.

    Yields:
        The question's index and its answer without special tokens.
    """
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].input_ids))
    device = next(model.parameters()).device
    stop: dict[str, Any] = {"stop_strings": [stop_string], "tokenizer": tokenizer} if stop_string else {}
    model.eval()
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = _left_padded([questions[i].input_ids for i in indices], tokenizer.pad_token_id)
        names = [name for i in indices for name in questions[i].image_files]
        if names:
            batch["pixel_values"] = pictures(names)
        output = model.generate(
            **{name: tensor.to(device) for name, tensor in batch.items()},
            do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, use_cache=True, **stop,
        )  # fmt: skip
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            yield index, text.split(stop_string)[0].strip() if stop_string else text.strip()


def _left_padded(rows: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
