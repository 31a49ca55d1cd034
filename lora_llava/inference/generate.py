"""Generate answers in batches: questions sorted by length, each image encoded once, with a KV cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lora_llava.data.images.image_sources import PixelLoader
from lora_llava.data.tokens import Stop
from lora_llava.inference.answer import Answer
from lora_llava.inference.batches import Batches, question_bytes
from lora_llava.inference.question import EncodedImages, Question
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.shared_prompts import begin_prompts, in_groups, shared_prompts, split_batch


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

    Questions about one image are batched together, and compute the beginning of their prompts once.

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
    shared = {} if drawn else shared_prompts(model, questions, left)
    order = in_groups(questions, left, shared)
    encoded = encoded or EncodedImages(model, load_pixels, questions, order)
    ending: dict[str, Any] = {"tokenizer": tokenizer} | ({"stop_strings": [stop.text]} if stop.text else {})
    model.eval()

    def answer(chosen: list[int]) -> dict[int, Answer]:
        if all(i in answered for i in chosen):
            return {}
        return {i: one for part in split_batch(chosen, shared) for i, one in answer_part(*part).items()}

    def answer_part(chosen: list[int], continued: bool) -> dict[int, Answer]:
        if continued:
            begun = begin_prompts(model, chosen, questions, shared, encoded, tokenizer.pad_token_id)
            batch, found = (begun.as_generate() if begun.indices else {}), begun.problems
        else:
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
