"""Variants of the model here, each with one fault, and which of them gives a server's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

from PIL import Image

from lora_llava.core.progress import progress_bar
from lora_llava.inference.client.chat_request import ChatAnswer
from lora_llava.model.families.tower_families import tiling_of
from lora_llava.publishing.verify.compared import ComparedAnswer
from lora_llava.publishing.verify.fixes import Fault
from lora_llava.publishing.verify.model_here import Likelihood, ModelHere, ToPixels

NOISE = 0.05
"""Nats per token by which log-probabilities of one model in float32 and in bf16 differ at most in most answers."""
_CLEARLY = 0.5
"""A variant explains the server's answers if its log-probabilities differ by less than this share of the model's."""


@dataclass(frozen=True)
class Fit:
    """How well a variant explains a server's answers.

    Attributes:
        fault: The variant's fault; None for the model as it is here.
        what: The variant in words.
        greedy: Answers whose every token is the likeliest one under it.
        answers: Number of answers.
        difference: Mean difference of log-probabilities, in nats per token; None if the server gives none.
        likelihoods: Of each answer.
    """

    fault: Fault | None
    what: str
    greedy: int
    answers: int
    difference: float | None
    likelihoods: tuple[Likelihood, ...]

    def explains_better(self, other: Fit) -> bool:
        """Check whether it explains the answers clearly better than another one does."""
        if self.difference is not None and other.difference is not None:
            is_wrong = other.difference > NOISE or self.greedy > other.greedy
            return is_wrong and self.difference < _CLEARLY * other.difference
        return self.greedy > other.greedy


def as_here(here: ModelHere, compared: Sequence[ComparedAnswer], prompts: Sequence[Sequence[int]]) -> Fit:
    """Return how well the model here explains a server's answers.

    Args:
        here: The model.
        compared: Answered questions.
        prompts: The ids of their prompts as the server has them.
    """
    return _fit(here, here.speaker.model, None, "the model here", compared, prompts, here.pixels)


def best_variant(
    here: ModelHere, compared: Sequence[ComparedAnswer], prompts: Sequence[Sequence[int]], plain: Fit
) -> Fit | None:
    """Return the variant that explains a server's answers best, if any explains them better than the model here.

    Args:
        here: The model.
        compared: Answered questions.
        prompts: The ids of their prompts as the server has them.
        plain: Of `as_here`.
    """
    shown = any(one.question.images() for one in compared)
    variants = [*_models(here), *(_images(here) if shown else [])]
    found = []
    with progress_bar(total=len(variants), desc="looking for the cause", unit="variant", leave=False) as bar:
        for fault, what, opened, pixels in variants:
            with opened() as model:
                if model is not None:
                    found.append(_fit(here, model, fault, what, compared, prompts, pixels))
            bar.update()
    better = [fit for fit in found if fit.explains_better(plain)]
    return min(better, key=lambda fit: (fit.difference or 0.0, -fit.greedy)) if better else None


_Variant = tuple[Fault, str, Callable[[], AbstractContextManager[Any]], ToPixels]


def _models(here: ModelHere) -> Iterator[_Variant]:
    yield "base not quantised", "the model here without NF4", here.unquantised, here.pixels
    yield "base served", "the base without the run's adapter and projector", here.without_training, here.pixels
    yield "adapter not active", "the base with the run's projector and without LoRA", here.without_lora, here.pixels


def _images(here: ModelHere) -> Iterator[_Variant]:
    def opened() -> AbstractContextManager[Any]:
        return nullcontext(here.speaker.model)

    for what, change in _IMAGES.items():
        yield "image resized otherwise", what, opened, _changed(here, change)
    if tiling_of(here.config) is None:
        for what, pad in (("images cropped to a square", False), ("images padded to a square", True)):
            yield "image resized otherwise", what, opened, _padding(here, pad)


def _at_half(image: Image.Image) -> Image.Image:
    return image.resize((max(1, image.width // 2), max(1, image.height // 2)))


def _within(image: Image.Image) -> Image.Image:
    side = max(image.size)
    frame = Image.new("RGB", (2 * side, 2 * side))
    frame.paste(image, (side - image.width // 2, side - image.height // 2))
    return frame


def _stretched(image: Image.Image) -> Image.Image:
    return image.resize((max(image.size), max(image.size)))


_IMAGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "images at half their resolution": _at_half,
    "images at half their size within the frame": _within,
    "images stretched to a square": _stretched,
}


def _changed(here: ModelHere, change: Callable[[Image.Image], Image.Image]) -> ToPixels:
    return lambda images: here.pixels([change(image) for image in images])


def _padding(here: ModelHere, pad: bool) -> ToPixels:
    processor = copy(here.processor.image_processor)
    processor.do_pad = pad
    return lambda images: dict(processor(list(images), return_tensors="pt"))


def _fit(
    here: ModelHere,
    model: Any,
    fault: Fault | None,
    what: str,
    compared: Sequence[ComparedAnswer],
    prompts: Sequence[Sequence[int]],
    to_pixels: ToPixels,
) -> Fit:
    found, differences = [], []
    for one, prompt in zip(compared, prompts, strict=True):
        answer = one.served.found
        assert isinstance(answer, ChatAnswer)
        ids = answer.token_ids or here.answer_ids(one.question, answer.text.strip(), stopped=answer.finish == "stop")
        images = one.question.images()
        shown = to_pixels(images) if images else {}
        likelihood = here.likelihood(model, here.fitted(prompt, images, shown), ids, shown)
        found.append(likelihood)
        if answer.logprobs is not None and abs(len(answer.logprobs) - len(ids)) <= 1:  # else tokens are not the same
            pairs = list(zip(answer.logprobs, likelihood.logprobs, strict=False))
            differences.append(sum(abs(theirs - ours) for theirs, ours in pairs) / max(1, len(pairs)))
    difference = sum(differences) / len(differences) if 2 * len(differences) > len(found) else None
    return Fit(fault, what, sum(one.is_greedy for one in found), len(found), difference, tuple(found))
