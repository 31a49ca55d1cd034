"""Streamed answers to chat messages, their prompts written by the model's own processor."""

from __future__ import annotations

import re
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lora_llava.core.errors import UserError
from lora_llava.data.images.to_rgb import Background
from lora_llava.inference.prompt import encode_prompt
from lora_llava.inference.sampling import Sampling
from lora_llava.model.vision import llava_of

MAX_IMAGE_PIXELS = 50_000_000
"""Most pixels of an image that is shown in a chat: what a recipe's `data.max_image_pixels` is by default."""
Message = dict[str, Any]
"""`{"role", "content"}` as `user_message` and `text_message` write it: content is always a list of parts, which every
processor's chat template takes."""
Finish = Literal["stop", "length", "stopped"]
"""Why an answer ended: by its own stop, at the most tokens, or because the caller stopped it."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
"""A byte of a letter that a Llama tokenizer has no token for."""


class FullError(UserError):
    """A conversation that is too long for the model."""


@dataclass(frozen=True)
class Speaker:
    """A model that answers.

    Attributes:
        model: A LLaVA, with or without adapter, in eval mode.
        processor: Its stock processor, with a chat template.
        name: What the person called it.
        stop_string: Ends an answer where the template's stop is ordinary text.
        single_turn: The template is `plain`: a prompt is one image and no text.
        background: What transparent parts of images are composited on, as the model was trained.
    """

    model: Any
    processor: Any
    name: str
    stop_string: str | None = None
    single_turn: bool = False
    background: Background = "white"


def text_message(role: str, text: str) -> Message:
    """A message of text alone; the role is `system`, `user` or `assistant`."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def user_message(text: str, images: Sequence[Image.Image] = ()) -> Message:
    """A user's message, its images before its text, as they were trained unless a recipe says otherwise."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if text else parts}


def encode_messages(speaker: Speaker, messages: Sequence[Message]) -> dict[str, torch.Tensor]:
    """Write the prompt that messages make.

    Args:
        speaker: Whose processor writes it.
        messages: In order, the last of them the user's.

    Returns:
        `input_ids` and `attention_mask`, int64 of shape (1, tokens), and with images `pixel_values`, float32 of
        shape (images, 3, height, width), on the model's device.

    Raises:
        UserError: For messages that the template refuses, or a prompt that leaves the model no position to answer in
            (`FullError`).
    """
    if speaker.single_turn and [part["type"] for message in messages for part in message["content"]] != ["image"]:
        raise UserError(f"{speaker.name} was trained on captions (template plain): give it one image and no text")
    try:
        batch = encode_prompt(speaker.processor, messages, llava_of(speaker.model).config.image_seq_length)
    except TemplateError as error:
        raise UserError(f"the chat template of {speaker.name} refuses these messages: {error}") from None
    tokens, positions = batch["input_ids"].shape[1], _positions(speaker)
    if tokens >= positions:
        raise FullError(
            f"the conversation has {tokens:,} tokens with this message, and the model {positions:,} positions; shorten "
            "it or start anew"
        )
    device = next(speaker.model.parameters()).device
    names = ("input_ids", "attention_mask", "pixel_values")
    return {name: batch[name].to(device) for name in names if name in batch}


def _positions(speaker: Speaker) -> int:
    return int(speaker.model.config.text_config.max_position_embeddings)


def stream_answer(
    speaker: Speaker, messages: Sequence[Message], sampling: Sampling, stop: threading.Event | None = None
) -> Generator[str, None, Finish]:
    """Answer, and give the text in pieces as it comes.

    Closing the generator stops the model after the token in hand.

    Args:
        speaker: Who answers.
        messages: The conversation, the last message the user's.
        sampling: How tokens are drawn; an answer also ends at the model's last position.
        stop: Set by another thread, it stops the answer.

    Yields:
        Pieces of the answer, none empty: without special tokens, the stop string and what is behind it, and white space
        at either end.

    Returns:
        Why it ended.

    Raises:
        UserError: As `encode_messages`.
    """
    batch = encode_messages(speaker, messages)
    limit = min(sampling.max_new_tokens, _positions(speaker) - batch["input_ids"].shape[1])
    stop, closed = stop or threading.Event(), threading.Event()
    queue: SimpleQueue[int | BaseException | None] = SimpleQueue()
    thread = threading.Thread(
        target=_generate,
        args=(speaker, batch, sampling, limit, queue, (stop, closed)),
        name="stream_answer",
        daemon=True,
    )
    thread.start()
    seen: list[int] = []
    try:
        with closing(text_pieces(_taken(queue, seen), speaker.processor.tokenizer, speaker.stop_string)) as pieces:
            by_text = yield from pieces
    finally:
        closed.set()
        thread.join()
    if stop.is_set():
        return "stopped"
    return "stop" if by_text or seen[-1:] == [speaker.processor.tokenizer.eos_token_id] else "length"


class _Streamer(BaseStreamer):
    """Hands tokens over as they are drawn; the prompt, which comes first, is left out."""

    def __init__(self, queue: SimpleQueue[int | BaseException | None]) -> None:
        self.queue, self.is_prompt = queue, True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            self.queue.put(int(value.item()))
        self.is_prompt = False

    def end(self) -> None:
        """`_generate` tells the end itself, which comes after an exception too."""


def _generate(
    speaker: Speaker,
    batch: dict[str, torch.Tensor],
    sampling: Sampling,
    limit: int,
    queue: SimpleQueue[int | BaseException | None],
    stops: Sequence[threading.Event],
) -> None:
    """Draw tokens into the queue; None ends it, an exception is handed over in its place."""

    def stopped(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), any(event.is_set() for event in stops), device=input_ids.device)

    tokenizer, tokens = speaker.processor.tokenizer, batch["input_ids"].shape[1]
    try:
        with torch.inference_mode():
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            speaker.model.generate(
                **batch,
                **sampling.as_generate() | {"max_new_tokens": limit},
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                use_cache=True,
                streamer=_Streamer(queue),
                tokenizer=tokenizer,
                stopping_criteria=StoppingCriteriaList([stopped]),
            )
        queue.put(None)
    except torch.OutOfMemoryError:
        queue.put(FullError(f"the GPU's memory does not hold the conversation of {tokens:,} tokens; start anew"))
    except BaseException as error:  # whatever it is, who waits for tokens has to hear of it
        queue.put(error)


def _taken(queue: SimpleQueue[int | BaseException | None], seen: list[int]) -> Iterator[int]:
    while (item := queue.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        seen.append(item)
        yield item


def text_pieces(
    tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase, stop_string: str | None = None
) -> Generator[str, None, bool]:
    """Decode tokens as they come; what may still change is held back.

    Args:
        tokens: Ids of an answer.
        tokenizer: Decodes them.
        stop_string: Ends the answer; no further token is taken.

    Yields:
        Pieces that joined are the whole decoded text up to the stop string, stripped.

    Returns:
        Whether the stop string came.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ids: list[int] = []
    said, ended = 0, False
    for token in tokens:
        if token in special or tokenizer.convert_ids_to_tokens(token) is None:  # a row that fills the vocabulary up
            continue
        ids.append(token)
        text, ended = _cut(_decode(tokenizer, _without_open_bytes(tokenizer, ids)), stop_string)
        piece, said = _next_piece(text, said, len(text) if ended else _settled(text, stop_string))
        if piece:
            yield piece
        if ended:
            return True
    text, ended = _cut(_decode(tokenizer, ids), stop_string)
    piece, _ = _next_piece(text, said, len(text))
    if piece:
        yield piece
    return ended


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _without_open_bytes(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Ids without a run of bytes at their end: one more byte can make the whole run another text."""
    end = len(ids)
    while end and _BYTE_TOKEN.fullmatch(tokenizer.convert_ids_to_tokens(ids[end - 1])):
        end -= 1
    return ids[:end]


def _cut(text: str, stop_string: str | None) -> tuple[str, bool]:
    if not stop_string or stop_string not in text:
        return text, False
    return text[: text.index(stop_string)], True


def _settled(text: str, stop_string: str | None) -> int:
    """How much of a text stays as it is, whatever comes: not the beginning of a letter's bytes, nor of the stop
    string."""
    end = len(text.rstrip("\ufffd"))
    beginnings = range(min(len(stop_string or "") - 1, end), 0, -1)
    return end - next((size for size in beginnings if text.endswith((stop_string or "")[:size], 0, end)), 0)


def _next_piece(text: str, said: int, end: int) -> tuple[str, int]:
    """What of `text[:end]` is to be said after `text[:said]`; white space at the end waits for what follows it."""
    start = max(said, len(text) - len(text.lstrip()))
    end = len(text[:end].rstrip())
    return (text[start:end], end) if end > start else ("", said)
