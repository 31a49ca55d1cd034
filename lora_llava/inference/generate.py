"""Batched answers: questions sorted by length, each image encoded once, a KV cache, the template's stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lora_llava.data.images.reading import BadImageError, PixelLoader
from lora_llava.inference.answer import Answer
from lora_llava.inference.sampling import Sampling
from lora_llava.model.vision import features_as_pixels, llava_of, tower_features


@dataclass(frozen=True)
class Question:
    """One prompt.

    Attributes:
        input_ids: Ids up to where the answer starts, image tokens expanded.
        image_files: Names of its images, in order.
    """

    input_ids: Sequence[int]
    image_files: Sequence[str] = ()


@torch.inference_mode()
def generate_answers(
    model: Any,
    questions: Sequence[Question],
    *,
    tokenizer: PreTrainedTokenizerBase,
    load_pixels: PixelLoader,
    batch_size: int,
    sampling: Sampling,
    stop_string: str | None = None,
    answered: Collection[int] = (),
    encoded: EncodedImages | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Answer questions, longest first, and give each batch's answers as they come.

    Args:
        model: A LLaVA, with or without adapter.
        questions: What to ask.
        tokenizer: The processor's; it pads on the left here.
        load_pixels: Gives the images that questions name.
        batch_size: Questions at once.
        sampling: How tokens are drawn; what is drawn depends on the seed and on which questions share a batch.
        stop_string: Ends an answer where the template's stop is ordinary text; taken off the answer.
        answered: Indices that are not asked again.
        encoded: Images that are shared with other calls; None keeps those of this one.

    Yields:
        The question's index and its answer; one with a problem where an image cannot be opened.
    """
    batches = _plan_batches(questions, answered, batch_size, drawn=sampling.temperature > 0)
    encoded = encoded or EncodedImages(model, load_pixels, questions, [i for chosen in batches for i in chosen])
    stop: dict[str, Any] = {"tokenizer": tokenizer} | ({"stop_strings": [stop_string]} if stop_string else {})
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
                eos_token_id=tokenizer.eos_token_id,
                use_cache=True,
                **stop,
            )
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            if index in answered:
                continue
            yield index, Answer(text.split(stop_string)[0].strip() if stop_string else text.strip())


def _plan_batches(
    questions: Sequence[Question], answered: Collection[int], batch_size: int, *, drawn: bool
) -> list[list[int]]:
    """Batches, longest first. What is drawn depends on who shares a batch: there a batch is asked as it would have
    been, those of it that were answered included."""

    def cut(indices: Sequence[int]) -> list[list[int]]:
        order = sorted(indices, key=lambda i: -len(questions[i].input_ids))
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    if drawn:
        return [chosen for chosen in cut(range(len(questions))) if not all(i in answered for i in chosen)]
    return cut([i for i in range(len(questions)) if i not in answered])


class EncodedImages:
    """Features of the images that questions share: the tower sees each once, and what no question needs any more is
    let go.

    Args:
        model: A LLaVA, with or without adapter; one without tower takes what `load_pixels` gives as features.
        load_pixels: Gives images by name.
        questions: Whose images are asked for.
        indices: Those of them that are asked.
        times: How often each is asked.
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
        self._held: dict[str, torch.Tensor] = {}
        self._bad: dict[str, BadImageError] = {}

    def batch(
        self, indices: Sequence[int], questions: Sequence[Question], pad_token_id: int
    ) -> tuple[dict[str, torch.Tensor], dict[int, Answer]]:
        """Left-padded ids of these questions with the features of their images, and those whose images are bad."""
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
        """While this is entered, the model takes features as its `pixel_values`."""
        return nullcontext() if self.llava.model.vision_tower is None else features_as_pixels(self.llava)

    def _encode(self, names: Sequence[str]) -> None:
        """Run the tower once over the batch's new images."""
        new = [name for name in dict.fromkeys(names) if name not in self._held]
        opened: dict[str, torch.Tensor] = {}
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
        # Each by itself: a view would keep the whole batch's alive.
        self._held |= {name: features.clone() for name, features in zip(opened, stacked, strict=True)}

    def _take(self, name: str) -> torch.Tensor:
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
