"""The padded collator: whole batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessorPil

from lora_llava.data import PaddedCollator, Pixels
from lora_llava.data.images.image_sources import BadImageError, FolderImages

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
PAD = 9


@pytest.fixture
def collator(images: Path) -> PaddedCollator:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 4}, crop_size={"height": 4, "width": 4})
    return PaddedCollator(Pixels(FolderImages(images, 16), processor), PAD)


def row(ids: list[int], labels: list[int], *images: str) -> dict[str, Any]:
    return {"row_id": "x", "input_ids": ids, "labels": labels, "image_files": list(images)}


ROWS = [
    row([1, 5, 6], [-100, 5, 6], "red.png"),
    row([1, 7, 8, 2, 4], [-100, -100, -100, 2, 4]),
    row([1, 2], [-100, 2], "blue.png", "green.png"),
]


def normalised(*colour: int) -> torch.Tensor:
    values = [(value / 255 - mean) / std for value, mean, std in zip(colour, MEAN, STD, strict=True)]
    return torch.tensor(values)[:, None, None].expand(3, 4, 4)


def test_a_whole_batch(collator: PaddedCollator) -> None:
    batch = collator(ROWS)
    expected = {
        "input_ids": [[1, 5, 6, PAD, PAD], [1, 7, 8, 2, 4], [1, 2, PAD, PAD, PAD]],
        "labels": [[-100, 5, 6, -100, -100], [-100, -100, -100, 2, 4], [-100, 2, -100, -100, -100]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
    }
    assert set(batch) == {*expected, "pixel_values"}
    for name, values in expected.items():
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == values
    pixels = torch.stack([normalised(255, 0, 0), normalised(0, 0, 255), normalised(0, 255, 0)])
    torch.testing.assert_close(batch["pixel_values"], pixels, rtol=0, atol=1e-6)


def test_images_follow_the_rows(collator: PaddedCollator) -> None:
    pixels = collator(ROWS[::-1])["pixel_values"]
    expected = torch.stack([normalised(0, 0, 255), normalised(0, 255, 0), normalised(255, 0, 0)])
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_a_batch_without_images_has_no_pixels(collator: PaddedCollator) -> None:
    batch = collator(ROWS[1:2])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 7, 8, 2, 4]],
        "labels": [[-100, -100, -100, 2, 4]],
        "attention_mask": [[1, 1, 1, 1, 1]],
    }


def test_a_pad_token_inside_a_row_is_seen(collator: PaddedCollator) -> None:
    batch = collator([row([1, PAD], [-100, PAD]), row([1], [-100])])
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[-100, PAD], [-100, -100]]


def test_a_missing_image_is_named(collator: PaddedCollator) -> None:
    with pytest.raises(BadImageError, match=r"^image pink.png is missing$"):
        collator([row([1], [-100], "pink.png")])
