"""Collate encoded rows into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lora_llava.data.encode import IGNORE_INDEX
from lora_llava.data.images.image_sources import PixelLoader
from lora_llava.data.packed_rows.shared_prefixes import Segment, segments_of


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
            `pixel_values` from `load_pixels`, in the order of the placeholders, and for a LLaVA-1.6 `image_sizes`.
        """
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        names = [name for row in rows for name in row["image_files"]]
        return batch | _images(names, self.load_pixels)


@dataclass
class PackedCollator:
    """Collator that packs rows into one row without padding and adds the pixels of their images.

    Neighbours with the same `prefix` share it: see `shared_prefixes`.

    Args:
        load_pixels: Loads the pixels of named images, such as `Pixels`.
    """

    load_pixels: PixelLoader

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows with `input_ids`, `labels`, `image_files`, and `prefix` if they may share one.

        Returns:
            `input_ids`, `labels` and `position_ids`, each int64 of shape (1, tokens), positions from 0 in every
            sample and continued from its prefix in a branch; `cu_seq_lens_q`, int32 of shape (segments + 1,), and
            `cu_seq_lens_k`, which differ if a prefix is shared; `max_length_q` and `max_length_k`; and `pixel_values`
            as in `PaddedCollator`. If a prefix is shared, `segment_lengths` and `key_segments`, lists: the tokens of
            each segment, and the segments whose keys attention reads, in order. If the first token of a branch is
            trained, `predictors`, int64 of shape (1, tokens): the position that predicts each token.

        Raises:
            ValueError: If the first token of a sample is trained: the sample before it would predict it.
        """
        for row in rows:
            if row["labels"][0] != IGNORE_INDEX:
                raise ValueError(f"the first token of sample {row.get('row_id')} is trained; its label must be ignored")
        segments = segments_of(rows)
        lengths = [segment.tokens for segment in segments]
        ids, labels = (
            torch.tensor([[one for each in segments for one in rows[each.sample][name][each.start : each.end]]])
            for name in ("input_ids", "labels")
        )
        ends = _ends(lengths)
        batch: dict[str, Any] = {
            "input_ids": ids,
            "labels": labels,
            "position_ids": torch.cat([torch.arange(each.start, each.end) for each in segments]).unsqueeze(0),
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
        names = [name for each in segments for name in _image_names(rows, each)]
        return (
            batch
            | _shared_keys(segments, lengths)
            | _predictors(segments, ends, labels)
            | _images(names, self.load_pixels)
        )


def _ends(lengths: Sequence[int]) -> torch.Tensor:
    return torch.cumsum(torch.tensor([0, *lengths], dtype=torch.int32), 0, dtype=torch.int32)


def _image_names(rows: Sequence[dict[str, Any]], segment: Segment) -> list[Any]:
    return list(rows[segment.sample]["image_files"][segment.first_image : segment.last_image])


def _shared_keys(segments: Sequence[Segment], lengths: list[int]) -> dict[str, Any]:
    """Return what attention needs to read the keys of prefixes; nothing if none is shared."""
    if all(segment.prefix is None for segment in segments):
        return {}
    read = [[own] if each.prefix is None else [each.prefix, own] for own, each in enumerate(segments)]
    keys = [sum(lengths[i] for i in each) for each in read]
    return {
        "cu_seq_lens_k": _ends(keys),
        "max_length_k": max(keys),
        "segment_lengths": lengths,
        "key_segments": [i for each in read for i in each],
    }


def _predictors(segments: Sequence[Segment], ends: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the position that predicts each token, if it is not always the one before it."""
    branches = [
        (int(ends[own]), int(ends[each.prefix + 1]) - 1) for own, each in enumerate(segments) if each.prefix is not None
    ]
    if not any(labels[0, first] != IGNORE_INDEX for first, _ in branches):
        return {}
    predictors = torch.arange(-1, labels.shape[1] - 1)
    for first, last_of_prefix in branches:
        predictors[first] = last_of_prefix
    return {"predictors": predictors.clamp(min=0).unsqueeze(0)}


def _images(names: Sequence[Any], load_pixels: PixelLoader) -> dict[str, torch.Tensor]:
    if not names:
        return {}
    batch, sizes = {"pixel_values": load_pixels(names)}, getattr(load_pixels, "sizes", None)
    return batch if sizes is None else batch | {"image_sizes": sizes(names)}
