"""Loss of plain text: shows what a language model has forgotten by training on images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from lora_llava.core.errors import UserError
from lora_llava.data.files.text_encoding import encoding_problem, text_encoding
from lora_llava.data.tokens import leading_ids
from lora_llava.model.vision import llava_of

PLAIN_ENGLISH = Path(__file__).with_name("plain_english.txt")
"""The default text, a page of plain English written for this purpose."""
WINDOW = 1024
"""Most tokens of a forward pass; a longer text is cut into windows, each without what came before it."""


@dataclass(frozen=True)
class TextLoss:
    """The loss of a text, in nats per token.

    Attributes:
        tokens: Number of predicted tokens.
        loss: Loss of the model as it is, with its adapter if it has one.
        base_loss: Loss without the adapter; None for a model without one.
    """

    tokens: int
    loss: float
    base_loss: float | None = None


def read_plain_text(file: Path) -> str:
    """Read a text file of any common encoding.

    Raises:
        UserError: If the file is missing, empty or not text.
    """
    if not file.is_file():
        raise UserError(f"--text: {file} is not a file; name a text file")
    if problem := encoding_problem(file):
        raise UserError(f"--text: {file}: {problem}")
    text = file.read_text(encoding=text_encoding(file)).strip()
    if not text:
        raise UserError(f"--text: {file} is empty; name a file with some sentences")
    return text


@torch.inference_mode()
def measure_text_loss(model: Any, tokenizer: Any, text: str) -> TextLoss:
    """Measure the loss of a text with and without a model's adapter: no image, no template, no system prompt.

    Args:
        model: A LLaVA in eval mode, with or without an adapter.
        tokenizer: Its tokenizer.
        text: The text; `<image>` and other special tokens in it are plain text.

    Raises:
        UserError: If the text is a single token, which nothing predicts.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    start = leading_ids(tokenizer)
    windows = [start + ids[place : place + WINDOW] for place in range(0, len(ids), WINDOW)]
    if (tokens := sum(len(window) - 1 for window in windows)) == 0:
        raise UserError("--text: the text is a single token, which nothing predicts; name a file with some sentences")
    loss = sum(_summed_loss(model, window) for window in windows) / tokens
    if not hasattr(model, "disable_adapter"):
        return TextLoss(tokens, loss)
    with model.disable_adapter():
        return TextLoss(tokens, loss, sum(_summed_loss(model, window) for window in windows) / tokens)


def _summed_loss(model: Any, window: Sequence[int]) -> float:
    ids = torch.tensor([window], device=llava_of(model).device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return float(functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum"))
