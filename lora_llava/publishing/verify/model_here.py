"""The model here: its prompts and greedy answers, and how likely a server's answers are under it and its variants."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from peft.tuners.lora import LoraLayer
from PIL import Image

from lora_llava.core.errors import UserError
from lora_llava.data.images.image_sources import Pixels
from lora_llava.data.templates.named_templates import TEMPLATES, chat_template
from lora_llava.data.tokens import leading_ids
from lora_llava.inference.generate import generate_answers
from lora_llava.inference.load import load_answering_model, needs_nf4, use_tiles_of
from lora_llava.inference.open_model import open_speaker
from lora_llava.inference.prompt import prompt_ids
from lora_llava.inference.question import Question
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.speak import Speaker
from lora_llava.model.adapters import NEWLINE, saved_newline
from lora_llava.model.families.tower_families import tokens_of_image
from lora_llava.model.provenance import locate_base
from lora_llava.model.start import RUN_FILE
from lora_llava.model.vision import llava_of
from lora_llava.model.weights.names import NEWLINE_NAME, canonical_name
from lora_llava.model.weights.tensor_files import lazy_tensors
from lora_llava.publishing.verify.asked_questions import AskedImages, AskedQuestion, images_in
from lora_llava.runs.directory import is_run

ToPixels = Callable[[Sequence[Image.Image]], Mapping[str, torch.Tensor]]
"""Preprocesses the images of a question: `pixel_values`, float32 of shape (images, 3, height, width); of a LLaVA-1.6,
(images, tiles, 3, height, width), with `image_sizes`."""


@dataclass(frozen=True)
class Likelihood:
    """A given answer under a model.

    Attributes:
        logprobs: Log-probability of each of its tokens, in nats.
        is_greedy: Whether each of its tokens is the likeliest one.
        gap: At the first token that is not the likeliest, by how many nats the likeliest is likelier; 0 if greedy.
    """

    logprobs: tuple[float, ...]
    is_greedy: bool
    gap: float


class ModelHere:
    """A loaded model with what is needed to compare a server with it.

    Args:
        name: A run directory, a folder with a complete LLaVA, or a Hub id.
        quantization: See `open_speaker`.

    Raises:
        UserError: If it cannot be loaded.
    """

    def __init__(self, name: str, quantization: Literal["auto", "nf4", "none"] = "auto") -> None:
        self.name = name
        self.speaker: Speaker = open_speaker(name, quantization=quantization)
        self.processor = self.speaker.processor
        self.tokenizer = self.processor.tokenizer
        self.config = llava_of(self.speaker.model).config
        self.image_id = self.config.image_token_id
        self.bos = leading_ids(self.tokenizer)

    def prompt(self, messages: Sequence[dict[str, Any]], template: str | None = None) -> list[int]:
        """Return the ids of a prompt, image tokens expanded.

        Args:
            messages: As `AskedQuestion` has them.
            template: Jinja text in place of the processor's chat template.
        """
        own = self.processor.chat_template
        try:
            self.processor.chat_template = template or own
            return prompt_ids(self.processor, messages, [self._tokens(image.size) for image in images_in(messages)])
        finally:
            self.processor.chat_template = own

    def _tokens(self, size: tuple[int, int]) -> int:
        """Return the number of tokens of an image of this width and height."""
        return tokens_of_image(self.config, (size[1], size[0]))

    def fitted(
        self, prompt: Sequence[int], images: Sequence[Image.Image], shown: Mapping[str, torch.Tensor]
    ) -> Sequence[int]:
        """Return a prompt with as many image tokens as its preprocessed images have.

        Args:
            prompt: The ids of a prompt with these images.
            images: The images of the question.
            shown: The preprocessed images, which may have other sizes and so, for a LLaVA-1.6, other numbers of tokens.
        """
        if "image_sizes" not in shown:
            return prompt
        found, place = [], 0
        for image, (height, width) in zip(images, shown["image_sizes"].tolist(), strict=True):
            start = list(prompt).index(self.image_id, place)
            found += [*prompt[place:start], *[self.image_id] * self._tokens((width, height))]
            place = start + self._tokens(image.size)
        return [*found, *prompt[place:]]

    def other_templates(self) -> Iterator[tuple[str, str]]:
        """Yield name and Jinja text of the named templates."""
        return ((name, chat_template(template)) for name, template in TEMPLATES.items())

    def pixels(self, images: Sequence[Image.Image]) -> Mapping[str, torch.Tensor]:
        """Preprocess images as in training; see `ToPixels`."""
        return dict(self.processor.image_processor(list(images), return_tensors="pt"))

    def answers(self, questions: Sequence[AskedQuestion], max_new_tokens: int) -> Iterator[tuple[int, str]]:
        """Answer questions greedily, and yield index and text of each."""
        images = AskedImages(questions)
        asked = [
            Question(self.prompt(question.messages), images.names(place)) for place, question in enumerate(questions)
        ]
        found = generate_answers(
            self.speaker.model,
            asked,
            tokenizer=self.tokenizer,
            load_pixels=Pixels(images, self.processor.image_processor),
            batch_size=4,
            sampling=Sampling(0.0, 1.0, max_new_tokens, 0),
            stop=self.speaker.stop,
        )
        return ((place, answer.text) for place, answer in found)

    def answer_ids(self, question: AskedQuestion, text: str, *, stopped: bool) -> list[int]:
        """Return the ids of an answer as they follow its prompt.

        Args:
            question: The question.
            text: The answer.
            stopped: Whether it ended by itself, so that a stop id follows.
        """
        answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        messages = [*question.messages, answer, {"role": "user", "content": [{"type": "text", "text": "?"}]}]
        prompt = self.prompt(question.messages)
        try:
            ids = self.prompt(messages)[len(prompt) :]
        except TemplateError:
            ids = self.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        stops = self.speaker.stop.ids
        end = next((place for place, token in enumerate(ids) if token in stops), None)
        if end is None:  # the stop is ordinary text, or the template drops it
            return list(self.tokenizer(f" {text}", add_special_tokens=False)["input_ids"])
        return ids[: end + 1] if stopped else ids[:end]

    @torch.inference_mode()
    def likelihood(
        self, model: Any, prompt: Sequence[int], answer: Sequence[int], shown: Mapping[str, torch.Tensor]
    ) -> Likelihood:
        """Compute how likely an answer is after a prompt.

        Args:
            model: This model or a variant of it.
            prompt: The ids of the prompt.
            answer: The ids of the answer, at least one.
            shown: The images of the prompt, preprocessed; see `ToPixels`.
        """
        device = next(model.parameters()).device
        ids = torch.tensor([[*prompt, *answer]], device=device)
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if shown:
            batch |= {name: tensor.to(device) for name, tensor in shown.items()}
            batch["pixel_values"] = batch["pixel_values"].to(llava_of(model).model.vision_tower.dtype)
        logits = model(**batch, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        logprobs = logits.log_softmax(-1)
        chosen = torch.tensor(list(answer), device=device)
        given = logprobs.gather(-1, chosen[:, None])[:, 0]
        behind = logprobs.max(-1).values - given
        wrong = (logits.argmax(-1) != chosen).nonzero()
        gap = float(behind[wrong[0, 0]]) if len(wrong) else 0.0
        return Likelihood(tuple(given.tolist()), not len(wrong), gap)

    @contextmanager
    def without_training(self) -> Iterator[Any]:
        """Give the base as it was before the run, without its adapter and projector.

        Yields:
            The base; None if the model is a complete one that names no base, or the base is missing.
        """
        model = self.speaker.model
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter(), self._base_newline():
                yield model
            return
        name = self._base()
        base = load_answering_model(name, None, dtype=str(model.dtype).removeprefix("torch.")) if name else None
        if base is not None:
            use_tiles_of(base.config, self.processor.image_processor.to_dict())
        yield base

    @contextmanager
    def _base_newline(self) -> Iterator[None]:
        """Give the model the base's newline where its adapter has one, which PEFT cannot disable."""
        newline, folder = saved_newline(self.speaker.model), Path(self.name)
        if newline is None or not (folder / RUN_FILE).is_file():
            yield
            return
        trained = newline.data
        base = locate_base(json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["base"], folder)
        stored = next(each for each in lazy_tensors(base) if canonical_name(each.name) == NEWLINE_NAME).load()
        newline.data = stored.to(trained)
        try:
            yield
        finally:
            newline.data = trained

    @contextmanager
    def without_lora(self) -> Iterator[Any]:
        """Give the base with the run's projector and without LoRA; None where `without_training` gives none."""
        model = self.speaker.model
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        if layers:
            try:
                for layer in layers:
                    layer.enable_adapters(False)
                yield model
            finally:
                for layer in layers:
                    layer.enable_adapters(True)
            return
        with self.without_training() if not hasattr(model, "disable_adapter") else nullcontext() as base:
            if base is not None:
                trained, inner = llava_of(model).model, llava_of(base).model
                inner.multi_modal_projector.load_state_dict(trained.multi_modal_projector.state_dict())
                if hasattr(inner, NEWLINE):
                    inner.image_newline.data.copy_(trained.image_newline)
            yield base

    @contextmanager
    def unquantised(self) -> Iterator[Any]:
        """Give the model with the base's weights as stored; None if it is not in NF4, or fits the NF4 base alone."""
        is_nf4 = getattr(self.speaker.model, "is_loaded_in_4bit", False)
        yield open_speaker(self.name, quantization="none").model if is_nf4 and not needs_nf4(Path(self.name)) else None

    def _base(self) -> str | None:
        """Return the base of the run that a merged folder came from."""
        folder = Path(self.name)
        if is_run(folder) or not (folder / RUN_FILE).is_file():
            return None
        try:
            return str(locate_base(json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["base"], folder))
        except (UserError, OSError, ValueError, KeyError, TypeError):
            return None
