"""What the trainer reads of a split: samples, the rows they are packed into, and a collator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from lora_llava.data.encode import IGNORE_INDEX


@dataclass(frozen=True)
class Feed:
    """The samples of a split and their order.

    Attributes:
        samples: With `input_ids`, `labels` and `image_files`.
        rows: Indices of the samples of each forward pass; with several ranks, rank r runs `rows[r::ranks]`.
        collator: Turns a list of samples into a batch.
    """

    samples: Sequence[dict[str, Any]]
    rows: list[list[int]]
    collator: Any


@dataclass(frozen=True)
class RowCollator:
    """Collate a row; an empty row becomes a sample without labels, so that every rank runs as many passes.

    Args:
        collator: The collator of the feed.
        sample: The sample that an empty row runs.
    """

    collator: Any
    sample: dict[str, Any]

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Any:
        unlabelled = dict(self.sample) | {"labels": [IGNORE_INDEX] * len(self.sample["input_ids"])}
        return self.collator(samples or [unlabelled])


def placeholder_dataset(feed: Feed) -> Dataset:
    """Return one sample as the `datasets.Dataset` that SFTTrainer inspects; our loaders read the feed itself."""
    return Dataset.from_list([{key: value for key, value in feed.samples[0].items() if key in ("input_ids", "labels")}])
