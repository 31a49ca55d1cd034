"""Generate answers in batches: questions sorted by length, each image encoded once, with a KV cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lora_llava.data.images.image_id import ImageName
from lora_llava.data.images.image_sources import BadImageError, PixelLoader
from lora_llava.data.tokens import Stop
from lora_llava.inference.answer import Answer
from lora_llava.inference.sampling import Sampling
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


@torch.inference_mode()
def generate_answers(
    model: Any,
    questions: Sequence[Question],
    *,
    tokenizer: PreTrainedTokenizerBase,
    load_pixels: PixelLoader,
    batch_size: int,
    sampling: Sampling,
    stop: Stop,
    answered: Collection[int] = (),
    encoded: EncodedImages | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Answer questions in batches, longest first, and yield the answers of each batch when it is done.

    Args:
        model: A LLaVA, with or without an adapter.
        questions: The prompts.
        tokenizer: The processor's tokenizer; prompts are padded on the left.
        load_pixels: Loads the images that questions name.
        batch_size: Questions per batch.
        sampling: How tokens are sampled; samples depend on the seed and on which questions share a batch.
        stop: Where an answer ends; a stop text is removed from it.
        answered: Indices to skip, because their answers exist.
        encoded: Encoded images shared with other calls; None encodes them for this call.

    Yields:
        The question's index and its answer, which has a problem set if an image cannot be opened.
    """
    batches = _plan_batches(questions, answered, batch_size, drawn=sampling.temperature > 0)
    encoded = encoded or EncodedImages(model, load_pixels, questions, [i for chosen in batches for i in chosen])
    ending: dict[str, Any] = {"tokenizer": tokenizer} | ({"stop_strings": [stop.text]} if stop.text else {})
    model.eval()
    for chosen in batches:
        batch, failed = encoded.batch(chosen, questions, tokenizer.pad_token_id)
        yield from failed.items()
        indices = [i for i in chosen if i not in failed]
        if not indices:
            continue
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed + indices[0])
        with encoded.as_pixels():
            output = model.generate(
                **batch,
                **sampling.as_generate(),
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=stop.ids,
                use_cache=True,
                **ending,
            )
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            if index in answered:
                continue
            yield index, Answer(text.split(stop.text)[0].strip() if stop.text else text.strip())


def _plan_batches(
    questions: Sequence[Question], answered: Collection[int], batch_size: int, *, drawn: bool
) -> list[list[int]]:
    """Group questions into batches, longest first.

    Samples depend on which questions share a batch, so with sampling an unfinished batch keeps its answered questions.
    """

    def cut(indices: Sequence[int]) -> list[list[int]]:
        order = sorted(indices, key=lambda i: -len(questions[i].input_ids))
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    if drawn:
        return [chosen for chosen in cut(range(len(questions))) if not all(i in answered for i in chosen)]
    return cut([i for i in range(len(questions)) if i not in answered])


class EncodedImages:
    """Image features shared by questions: each image is encoded once and freed after its last use.

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
        self.uses = Counter(name for i in indices for name in questions[i].image_files for _ in range(times))
        self.device = next(model.parameters()).device
        self._held: dict[ImageName, torch.Tensor] = {}
        self._bad: dict[ImageName, BadImageError] = {}

    def batch(
        self, indices: Sequence[int], questions: Sequence[Question], pad_token_id: int
    ) -> tuple[dict[str, torch.Tensor], dict[int, Answer]]:
        """Return left-padded ids and image features of these questions, and answers for those with a bad image."""
        features: list[torch.Tensor] = []
        failed: dict[int, Answer] = {}
        self._encode([name for i in indices for name in questions[i].image_files])
        for i in indices:
            try:
                found = [self._take(name) for name in questions[i].image_files]
            except BadImageError as error:
                failed[i] = Answer("", problem=str(error), is_image=True)
                continue
            features += found
        kept = [questions[i].input_ids for i in indices if i not in failed]
        batch = _left_padded(kept, pad_token_id) if kept else {}
        if features:
            batch["pixel_values"] = torch.stack(features)
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
                opened[name] = self.load_pixels([name])[0]
            except BadImageError as error:
                self._bad[name] = error
        if not opened:
            return
        stacked = torch.stack(list(opened.values())).to(self.device)
        tower = self.llava.model.vision_tower
        if tower is not None:
            stacked = tower_features(tower, self.llava.config, stacked.to(tower.dtype))
        # Clone each one: a view would keep the features of the entire batch in memory.
        self._held |= {name: features.clone() for name, features in zip(opened, stacked, strict=True)}

    def _take(self, name: ImageName) -> torch.Tensor:
        if name not in self._held:
            raise self._bad[name]
        features = self._held[name]
        self.uses[name] -= 1
        if self.uses[name] <= 0:
            self._held.pop(name, None)
        return features


def _left_padded(rows: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
