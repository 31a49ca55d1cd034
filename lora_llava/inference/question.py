"""Encoded prompts with their images, each of which is encoded once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lora_llava.data.images.image_id import ImageName
from lora_llava.data.images.image_sources import BadImageError, PixelLoader
from lora_llava.inference.answer import Answer
from lora_llava.model.vision import features_as_pixels, llava_of, tower_features


@dataclass(frozen=True)
class Question:
    """One encoded prompt.

    Attributes:
        input_ids: Token ids up to where the answer starts, image tokens expanded.
        image_files: Names of its images, in order.
    """

    input_ids: Sequence[int]
    image_files: Sequence[ImageName] = ()


class EncodedImages:
    """Image features shared by questions: each image, with its tiles, is encoded once and freed after its last use.

    Args:
        model: A LLaVA, with or without an adapter; without a vision tower, `load_pixels` must return features.
        load_pixels: Loads images by name.
        questions: The questions that name the images.
        indices: Indices of the questions to answer.
        times: How often each question is answered.
    """

    def __init__(
        self,
        model: Any,
        load_pixels: PixelLoader,
        questions: Sequence[Question],
        indices: Sequence[int],
        times: int = 1,
    ) -> None:
        self.llava = llava_of(model)
        self.load_pixels = load_pixels
        self.sizes = getattr(load_pixels, "sizes", None)
        self.uses = Counter(name for i in indices for name in questions[i].image_files for _ in range(times))
        self.device = next(model.parameters()).device
        self._held: dict[ImageName, torch.Tensor] = {}
        self._bad: dict[ImageName, BadImageError] = {}

    def batch(
        self, indices: Sequence[int], questions: Sequence[Question] | Mapping[int, Question], pad_token_id: int
    ) -> tuple[dict[str, torch.Tensor], dict[int, Answer]]:
        """Return left-padded ids and image features of these questions, and answers for those with a bad image.

        For a LLaVA-1.6, the features are those of all tiles, and the batch has `image_sizes`.
        """
        features: list[torch.Tensor] = []
        failed: dict[int, Answer] = {}
        of = {i: questions[i].image_files for i in indices}.__getitem__
        self._encode([name for i in indices for name in of(i)])
        for i in indices:
            names = of(i)
            bad = next((self._bad[name] for name in names if name not in self._held), None)
            if bad is not None:
                failed[i] = Answer("", problem=str(bad), is_image=True)
                continue
            features += [self._held[name] for name in names]
        kept = [questions[i].input_ids for i in indices if i not in failed]
        batch = left_padded(kept, pad_token_id) if kept else {}
        if features:
            batch["pixel_values"] = torch.cat(features)
            if self.sizes is not None:
                batch["image_sizes"] = self.sizes([name for i in indices if i not in failed for name in of(i)])
        return {name: tensor.to(self.device) for name, tensor in batch.items()}, failed

    def as_pixels(self) -> Any:
        """Return a context in which the model accepts features as its `pixel_values`."""
        return nullcontext() if self.llava.model.vision_tower is None else features_as_pixels(self.llava)

    def _encode(self, names: Sequence[ImageName]) -> None:
        """Run the tower once over the batch's new images."""
        new = [name for name in dict.fromkeys(names) if name not in self._held]
        opened: dict[ImageName, torch.Tensor] = {}
        for name in new:
            try:
                opened[name] = self.load_pixels([name])
            except BadImageError as error:
                self._bad[name] = error
        if not opened:
            return
        stacked = torch.cat(list(opened.values())).to(self.device)
        tower = self.llava.model.vision_tower
        if tower is not None:
            stacked = tower_features(tower, self.llava.config, stacked.to(tower.dtype))
        # Clone each one: a view would keep the features of the entire batch in memory.
        parts = stacked.split([len(each) for each in opened.values()])
        self._held |= {name: features.clone() for name, features in zip(opened, parts, strict=True)}

    def release(self, indices: Sequence[int], questions: Sequence[Question]) -> None:
        """Free the features that were used for the last time by these questions."""
        for name in (name for i in indices for name in questions[i].image_files):
            self.uses[name] -= 1
            if self.uses[name] <= 0:
                self._held.pop(name, None)


def left_padded(rows: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, int64 of shape (rows, longest), with padding on the left."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
