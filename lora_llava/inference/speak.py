"""Stream answers to chat messages, with prompts written by the model's processor."""

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

from lora_llava.core.device import is_out_of_memory
from lora_llava.core.errors import UserError
from lora_llava.data.images.to_rgb import Background
from lora_llava.data.tokens import Stop
from lora_llava.inference.prompt import encode_prompt
from lora_llava.inference.sampling import Sampling
from lora_llava.model.vision import llava_of

MAX_IMAGE_PIXELS = 50_000_000
"""Most pixels of an image in a chat, the default of a recipe's `data.max_image_pixels`."""
Message = dict[str, Any]
"""`{"role", "content"}` as `user_message` and `text_message` build it. The content is always a list of parts, which
every processor's chat template accepts."""
Finish = Literal["stop", "length", "stopped"]
"""Why an answer ended: at the template's stop, at the token limit, or stopped by the caller."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
"""A byte token, which Llama tokenizers use for letters without a token."""


class FullError(UserError):
    """The conversation is too long for the model."""


@dataclass(frozen=True)
class Speaker:
    """A model that answers chat messages, with its processor.

    Attributes:
        model: A LLaVA in eval mode, with or without an adapter.
        processor: Its stock processor, with a chat template.
        name: The path or Hub id that the user named.
        stop: Where an answer ends.
        single_turn: Whether the template is `plain`: a prompt is one image and no text.
        background: Colour behind transparent parts of images, as in training.
    """

    model: Any
    processor: Any
    name: str
    stop: Stop
    single_turn: bool = False
    background: Background = "white"


def text_message(role: str, text: str) -> Message:
    """Build a message of text only; the role is `system`, `user` or `assistant`."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def user_message(text: str, images: Sequence[Image.Image] = ()) -> Message:
    """Build a user message with images before the text, the default order of training."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if text else parts}


def encode_messages(speaker: Speaker, messages: Sequence[Message]) -> dict[str, torch.Tensor]:
    """Encode messages as the input of a speaker's model.

    Args:
        speaker: The model and its processor.
        messages: The messages in order, the last one from the user.

    Returns:
        `input_ids` and `attention_mask`, int64 of shape (1, tokens); with images also `pixel_values`, float32 of
        shape (images, 3, height, width), or for a LLaVA-1.6 (images, tiles, 3, height, width) with
        `image_sizes`. All are on the model's device.

    Raises:
        UserError: For messages that the template rejects.
        FullError: For a prompt that leaves no position for an answer.
    """
    if speaker.single_turn and [part["type"] for message in messages for part in message["content"]] != ["image"]:
        raise UserError(f"{speaker.name} was trained on captions (template plain); send one image and no text")
    try:
        batch = encode_prompt(speaker.processor, messages, llava_of(speaker.model).config)
    except TemplateError as error:
        raise UserError(f"the chat template of {speaker.name} rejects these messages: {error}") from None
    tokens, positions = batch["input_ids"].shape[1], _positions(speaker)
    if tokens >= positions:
        raise FullError(
            f"the conversation with this message has {tokens:,} tokens, and the model only {positions:,} positions; "
            "shorten the message or start a new conversation"
        )
    device = next(speaker.model.parameters()).device
    names = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
    return {name: batch[name].to(device) for name in names if name in batch}


def _positions(speaker: Speaker) -> int:
    return int(speaker.model.config.text_config.max_position_embeddings)


def stream_answer(
    speaker: Speaker, messages: Sequence[Message], sampling: Sampling, stop: threading.Event | None = None
) -> Generator[str, None, Finish]:
    """Generate an answer and yield its text in pieces.

    Closing the generator stops the model after the current token.

    Args:
        speaker: The model that answers.
        messages: The conversation, the last message from the user.
        sampling: How tokens are sampled; an answer also ends at the model's last position.
        stop: An event that another thread sets to stop the answer.

    Yields:
        Non-empty pieces of the answer, without special tokens, without the stop string and any text behind it, and
        without leading or trailing white space.

    Returns:
        Why the answer ended.

    Raises:
        UserError: For messages that `encode_messages` rejects.
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
        with closing(text_pieces(_taken(queue, seen), speaker.processor.tokenizer, speaker.stop.text)) as pieces:
            by_text = yield from pieces
    finally:
        closed.set()
        thread.join()
    if stop.is_set():
        return "stopped"
    return "stop" if by_text or (seen and seen[-1] in speaker.stop.ids) else "length"


class _Streamer(BaseStreamer):
    """Put each generated token into a queue, and skip the prompt, which comes first."""

    def __init__(self, queue: SimpleQueue[int | BaseException | None]) -> None:
        self.queue, self.is_prompt = queue, True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            self.queue.put(int(value.item()))
        self.is_prompt = False

    def end(self) -> None:
        """Do nothing: `_generate` marks the end itself, after an exception too."""


def _generate(
    speaker: Speaker,
    batch: dict[str, torch.Tensor],
    sampling: Sampling,
    limit: int,
    queue: SimpleQueue[int | BaseException | None],
    stops: Sequence[threading.Event],
) -> None:
    """Generate tokens into the queue, then None, or the exception that ended the generation."""

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
                eos_token_id=speaker.stop.ids,
                use_cache=True,
                streamer=_Streamer(queue),
                tokenizer=tokenizer,
                stopping_criteria=StoppingCriteriaList([stopped]),
            )
        queue.put(None)
    except BaseException as error:  # pass any error on, or the reader of the queue would wait forever
        message = f"the conversation of {tokens:,} tokens does not fit into memory; start a new conversation"
        queue.put(FullError(message) if is_out_of_memory(error) else error)


def _taken(queue: SimpleQueue[int | BaseException | None], seen: list[int]) -> Iterator[int]:
    while (item := queue.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        seen.append(item)
        yield item


def text_pieces(
    tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase, stop_string: str | None = None
) -> Generator[str, None, bool]:
    """Decode tokens as they arrive, and delay text that later tokens may still change.

    Args:
        tokens: Token ids of an answer.
        tokenizer: The tokenizer that decodes them.
        stop_string: Text that ends the answer; no token after it is consumed.

    Yields:
        Pieces that join to the decoded text up to the stop string, stripped.

    Returns:
        Whether the stop string appeared.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ids: list[int] = []
    sent, ended = 0, False
    for token in tokens:
        if token in special or tokenizer.convert_ids_to_tokens(token) is None:  # padding of the vocabulary
            continue
        ids.append(token)
        text, ended = _cut(_decode(tokenizer, _without_open_bytes(tokenizer, ids)), stop_string)
        piece, sent = _next_piece(text, sent, len(text) if ended else _settled(text, stop_string))
        if piece:
            yield piece
        if ended:
            return True
    text, ended = _cut(_decode(tokenizer, ids), stop_string)
    piece, _ = _next_piece(text, sent, len(text))
    if piece:
        yield piece
    return ended


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _without_open_bytes(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Return the ids without byte tokens at the end: one more byte can change the text of all of them."""
    end = len(ids)
    while end and _BYTE_TOKEN.fullmatch(tokenizer.convert_ids_to_tokens(ids[end - 1])):
        end -= 1
    return ids[:end]


def _cut(text: str, stop_string: str | None) -> tuple[str, bool]:
    if not stop_string or stop_string not in text:
        return text, False
    return text[: text.index(stop_string)], True


def _settled(text: str, stop_string: str | None) -> int:
    """Return how many characters are final: all but an incomplete letter or the start of the stop string."""
    end = len(text.rstrip("\ufffd"))
    beginnings = range(min(len(stop_string or "") - 1, end), 0, -1)
    return end - next((size for size in beginnings if text.endswith((stop_string or "")[:size], 0, end)), 0)


def _next_piece(text: str, sent: int, end: int) -> tuple[str, int]:
    """Return the part of `text[:end]` after `text[:sent]`, without white space at its end, and where it ends."""
    start = max(sent, len(text) - len(text.lstrip()))
    end = len(text[:end].rstrip())
    return (text[start:end], end) if end > start else ("", sent)
