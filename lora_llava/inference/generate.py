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
from lora_llava.inference.batches import Batches, question_bytes
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
    batch_size: int | Batches,
    sampling: Sampling,
    stop: Stop,
    answered: Collection[int] = (),
    encoded: EncodedImages | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Answer questions in batches, longest first, and yield the answers of each batch when it is done.

    Batches are smaller where free memory demands it, and halved where it runs out.

    Args:
        model: A LLaVA, with or without an adapter.
        questions: The prompts.
        tokenizer: The processor's tokenizer; prompts are padded on the left.
        load_pixels: Loads the images that questions name.
        batch_size: Most questions per batch.
        sampling: How tokens are sampled; samples depend on the seed and on which questions share a batch.
        stop: Where an answer ends; a stop text is removed from it.
        answered: Indices to skip, because their answers exist.
        encoded: Encoded images shared with other calls; None encodes them for this call.

    Yields:
        The question's index and its answer, which has a problem set if an image cannot be opened.
    """
    drawn = sampling.temperature > 0
    # Samples depend on which questions share a batch, so an unfinished batch keeps its answered questions.
    left = [i for i in range(len(questions)) if drawn or i not in answered]
    order = sorted(left, key=lambda i: -len(questions[i].input_ids))
    encoded = encoded or EncodedImages(model, load_pixels, questions, order)
    ending: dict[str, Any] = {"tokenizer": tokenizer} | ({"stop_strings": [stop.text]} if stop.text else {})
    model.eval()

    def answer(chosen: list[int]) -> dict[int, Answer]:
        if all(i in answered for i in chosen):
            return {}
        batch, found = encoded.batch(chosen, questions, tokenizer.pad_token_id)
        indices = [i for i in chosen if i not in found]
        if not indices:
            return found
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
            found[index] = Answer(text.split(stop.text)[0].strip() if stop.text else text.strip())
        return found

    def needed(index: int) -> int:
        return question_bytes(model, len(questions[index].input_ids), new_tokens=sampling.max_new_tokens)

    for chosen, found in Batches.of(batch_size).run(order, answer, needed):
        encoded.release(chosen, questions)
        yield from ((index, each) for index, each in found.items() if index not in answered)


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
            names = questions[i].image_files
            bad = next((self._bad[name] for name in names if name not in self._held), None)
            if bad is not None:
                failed[i] = Answer("", problem=str(bad), is_image=True)
                continue
            features += [self._held[name] for name in names]
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

    def release(self, indices: Sequence[int], questions: Sequence[Question]) -> None:
        """Free the features that were used for the last time by these questions."""
        for name in (name for i in indices for name in questions[i].image_files):
            self.uses[name] -= 1
            if self.uses[name] <= 0:
                self._held.pop(name, None)


def _left_padded(rows: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
