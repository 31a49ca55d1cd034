"""Local teacher: an instruct model loaded by transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_llava.core.device import has_bfloat16
from lora_llava.core.errors import UserError
from lora_llava.data.typed import as_typed, special_tokens, text_backend
from lora_llava.inference.batches import Batches
from lora_llava.inference.client.chat_request import ChatAnswer, ChatRequest
from lora_llava.inference.client.client import Again
from lora_llava.inference.sampling import Sampling
from lora_llava.model.loading import default_device
from lora_llava.synthesis.teachers.teacher import Answers, Teacher, TeacherRequest


def load_teacher(name: str, dtype: str, batch_size: int) -> Teacher:
    """Load a local instruct model as a teacher.

    Args:
        name: Folder or Hub id of the model.
        dtype: `auto`, `bfloat16`, `float16` or `float32`.
        batch_size: Number of requests per batch.

    Raises:
        UserError: If the model is missing, cannot be read, or has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        emulated = dtype == "auto" and torch.cuda.is_available() and not has_bfloat16()  # the dtype of most files
        model = AutoModelForCausalLM.from_pretrained(name, dtype="float16" if emulated else dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"teacher.model: {name} cannot be loaded: {str(error).splitlines()[0]}") from None
    if not tokenizer.chat_template:
        raise UserError(f"teacher.model: {name} has no chat template; name an instruct model, which has one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return by_model(model.to(default_device()).eval(), tokenizer, batch_size)


def by_model(model: Any, tokenizer: Any, batch_size: int) -> Teacher:
    """Return a teacher that is a loaded instruct model.

    Args:
        model: A causal language model.
        tokenizer: The model's tokenizer, with a chat template.
        batch_size: Number of requests per batch.
    """

    def answer(requests: Iterable[TeacherRequest], again: Again | None = None) -> Answers:
        fitting = Batches(batch_size, "requests", "lower the tokens that a request may generate")
        for start, batch in _batches(requests, batch_size):
            asked = [each.request for each in batch]

            def write(places: list[int], asked: list[ChatRequest] = asked) -> list[ChatAnswer]:
                return _write(model, tokenizer, [asked[place] for place in places])

            for places, found in fitting.run(range(len(asked)), write):
                yield from zip((start + place for place in places), found, strict=True)

    return answer


def _batches(requests: Iterable[TeacherRequest], size: int) -> Iterator[tuple[int, list[TeacherRequest]]]:
    """Yield batches, each with the index of its first request."""
    start, batch = 0, []
    for each in requests:
        batch.append(each)
        if len(batch) == size:
            yield start, batch
            start, batch = start + size, []
    if batch:
        yield start, batch


def _write(model: Any, tokenizer: Any, requests: list[ChatRequest]) -> list[ChatAnswer]:
    """Generate the answers of one batch, whose requests share their settings."""
    specials = special_tokens(tokenizer)
    rows = []
    for each in requests:
        messages = [{**message, "content": as_typed(message["content"], specials)} for message in each.messages]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        rows.append(text_backend(tokenizer, [text]).encode(text, add_special_tokens=False).ids)
    inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="left").to(model.device)
    settings = requests[0]
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    sampling = Sampling(settings.temperature or 0.0, settings.top_p, settings.max_tokens, settings.seed)
    ids = model.generate(**inputs, **sampling.as_generate(), pad_token_id=tokenizer.pad_token_id)
    found = []
    for prompt, row in zip(inputs.attention_mask, ids[:, inputs.input_ids.shape[1] :], strict=True):
        length = int((row != tokenizer.pad_token_id).sum())
        text = tokenizer.decode(row, skip_special_tokens=True).strip()
        found.append(ChatAnswer(text, int(prompt.sum()), length, tokenizer.name_or_path))
    return found
