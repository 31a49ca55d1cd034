"""Stage 1 captions from LLaVA's `chat.json` form (LLaVA-Pretrain, LLaVA-CC3M-Pretrain-595K)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from lora_llava.data.conversation import Conversation, EncodingError, read_turns
from lora_llava.errors import UserError


def load_captions(path: str | Path) -> list[Conversation]:
    """Read captions.

    Args:
        path: A JSON list of `{"id", "image", "conversations": [human, gpt]}`.

    Returns:
        One conversation of one picture, a request and its caption per row.

    Raises:
        UserError: For a missing file, one that is not such a list, or a row that lacks a field.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"data.path: {path} is missing; it should be a file such as chat.json")
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: it should hold a list of rows; it holds {type(rows).__name__}")
    return [_conversation(row, index) for index, row in enumerate(rows)]


def _conversation(row: Any, index: int) -> Conversation:
    name = str(row.get("id", index)) if isinstance(row, dict) else str(index)
    try:
        turns = read_turns(row["conversations"])
        if not isinstance(row["image"], str):
            raise UserError(f"row {name}: image is {row['image']!r}; it should be a file's name")
        return Conversation(name, turns, (row["image"],))
    except EncodingError as error:
        raise UserError(f"row {name}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"row {name}: {error} is missing; a row holds id, image and conversations") from None


def split_rows(rows: list[Conversation], held_back: int, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Hold rows back for validation, drawn by the seed; rows of one picture stay together.

    Args:
        rows: All rows.
        held_back: How many at the least are held back.
        seed: Draws them.

    Returns:
        Training rows and validation rows, each in their old order.

    Raises:
        UserError: Where nothing would be left to train on.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    pictures = {rows[i].images for i in order[:held_back]}
    train = [row for row in rows if row.images not in pictures]
    if not train:
        raise UserError(f"data.validation_rows is {held_back}, of {len(rows)} rows; leave some to train on")
    return train, [row for row in rows if row.images in pictures]
