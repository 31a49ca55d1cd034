"""Collate encoded rows into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lora_llava.data.encode import IGNORE_INDEX
from lora_llava.data.images.image_sources import PixelLoader


@dataclass
class PaddedCollator:
    """Collator that pads rows on the right and adds the pixels of their images.

    Args:
        load_pixels: Loads the pixels of named images, such as `Pixels`.
        pad_token_id: The padding of `input_ids`.
    """

    load_pixels: PixelLoader
    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows with `input_ids`, `labels` and `image_files`.

        Returns:
            `input_ids`, `labels` and `attention_mask`, each int64 of shape (rows, longest), and, if a row has an image,
            `pixel_values` from `load_pixels`, in the order of the placeholders.
        """
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        return batch | _images_of(rows, self.load_pixels)


@dataclass
class PackedCollator:
    """Collator that packs rows into one row without padding and adds the pixels of their images.

    Args:
        load_pixels: Loads the pixels of named images, such as `Pixels`.
    """

    load_pixels: PixelLoader

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows with `input_ids`, `labels` and `image_files`.

        Returns:
            `input_ids`, `labels` and `position_ids`, each int64 of shape (1, tokens), positions from 0 in every
            sample; `cu_seq_lens_q` and `cu_seq_lens_k`, int32 of shape (samples + 1,); `max_length_q` and
            `max_length_k`; and `pixel_values` as in `PaddedCollator`.

        Raises:
            ValueError: If the first token of a sample is trained: the sample before it would predict it.
        """
        for row in rows:
            if row["labels"][0] != IGNORE_INDEX:
                raise ValueError(f"the first token of sample {row.get('row_id')} is trained; its label must be ignored")
        lengths = torch.tensor([0] + [len(row["input_ids"]) for row in rows], dtype=torch.int32)
        ends = torch.cumsum(lengths, 0, dtype=torch.int32)
        longest = int(lengths.max())
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
            "labels": torch.tensor([[label for row in rows for label in row["labels"]]]),
            "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows]).unsqueeze(0),
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        return batch | _images_of(rows, self.load_pixels)


def _images_of(rows: Sequence[dict[str, Any]], load_pixels: PixelLoader) -> dict[str, torch.Tensor]:
    names = [name for row in rows for name in row["image_files"]]
    return {"pixel_values": load_pixels(names)} if names else {}
