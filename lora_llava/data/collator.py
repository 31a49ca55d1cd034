"""Rows to batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lora_llava.data.encode import IGNORE_INDEX
from lora_llava.data.images import ImageSource


@dataclass
class PaddedCollator:
    """Pads encoded rows on the right and opens their pictures.

    Args:
        images: Opens the pictures that rows name.
        image_processor: The exported processor's, so that training and serving see the same pixels.
        pad_token_id: Fills `input_ids`.
    """

    images: ImageSource
    image_processor: Any
    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows with `input_ids`, `labels` and `image_files`.

        Returns:
            `input_ids`, `labels` and `attention_mask`, each int64 of shape (rows, longest), and, where a row has a
            picture, `pixel_values`, float32 of shape (pictures, 3, height, width) in the order of the placeholders.
        """
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        names = [name for row in rows for name in row["image_files"]]
        if names:
            pictures = [self.images.open(name) for name in names]
            batch["pixel_values"] = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return batch
