"""Encode prompts with a model's processor, with special tokens in the user's text encoded as ordinary text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import LlavaConfig

from lora_llava.data.conversation import IMAGE_PLACEHOLDER
from lora_llava.data.typed import as_typed, special_tokens, text_backend
from lora_llava.model.families.tower_families import tokens_of_image

Message = Mapping[str, Any]


def has_special_token(processor: Any, messages: Sequence[Message]) -> bool:
    """Check whether the text of any message contains a special token of the tokenizer."""
    specials = special_tokens(processor.tokenizer)
    return any(token in text for text in _texts(messages) for token in specials)


def prompt_ids(
    processor: Any, messages: Sequence[Message], num_image_tokens: int | Sequence[int], *, answered: bool = False
) -> list[int]:
    """Render messages with the processor's chat template and tokenize them, with typed special tokens as text.

    Without such tokens, the ids equal those of `processor.apply_chat_template(tokenize=True)`.

    Args:
        processor: A stock processor with a chat template.
        messages: `{"role", "content"}`, the content a list of text and image parts.
        num_image_tokens: Tokens per image, or of each image in order.
        answered: Whether the last message is the answer, which is encoded too.

    Returns:
        The ids of the prompt, up to where the answer starts, or to the end of the conversation.
    """
    tokenizer = processor.tokenizer
    specials = special_tokens(tokenizer)
    marked = [{**message, "content": _marked(message["content"], specials)} for message in messages]
    written = processor.apply_chat_template(marked, add_generation_prompt=not answered, tokenize=False)
    first, *rest = written.split(IMAGE_PLACEHOLDER)
    counts = [num_image_tokens] * len(rest) if isinstance(num_image_tokens, int) else num_image_tokens
    written = first + "".join(IMAGE_PLACEHOLDER * count + text for count, text in zip(counts, rest, strict=True))
    has_bos = bool(tokenizer.bos_token) and written.startswith(tokenizer.bos_token)
    return list(text_backend(tokenizer, [written]).encode(written, add_special_tokens=not has_bos).ids)


def encode_prompt(processor: Any, messages: Sequence[Message], config: LlavaConfig) -> dict[str, torch.Tensor]:
    """Encode messages as input tensors for a model.

    Args:
        processor: A stock processor with a chat template.
        messages: As for `prompt_ids`, with an `image` in each image part.
        config: The model's configuration, which says how many tokens an image has.

    Returns:
        `input_ids` and `attention_mask`, int64 of shape (1, tokens); with images also `pixel_values`, float32 of shape
        (images, 3, height, width); for a LLaVA-1.6 (images, tiles, 3, height, width), with `image_sizes`.
    """
    if not has_special_token(processor, messages):
        return dict(
            processor.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        )
    images = [image for message in messages for image in _images(message["content"])]
    counts = [tokens_of_image(config, (image.height, image.width)) for image in images]
    ids = torch.tensor([prompt_ids(processor, messages, counts)])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | dict(processor.image_processor(images, return_tensors="pt")) if images else batch


def _texts(messages: Sequence[Message]) -> Iterable[str]:
    return (part["text"] for message in messages for part in message["content"] if part["type"] == "text")


def _images(content: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
    return [part["image"] for part in content if part["type"] == "image"]


def _marked(content: Sequence[Mapping[str, Any]], specials: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {**part, "text": as_typed(part["text"], specials)} if part["type"] == "text" else dict(part) for part in content
    ]
