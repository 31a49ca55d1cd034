"""What every data source becomes: a conversation, with the names of its images."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_llava.core.errors import RefusedError
from lora_llava.data.typed import MARK, as_typed, without_marks

IMAGE_PLACEHOLDER = "<image>"
ImagePosition = Literal["first", "last", "random", "as_written"]
Message = Mapping[str, Any]
"""`{"role", "content"}` as in transformers (content a string, or parts of type text and image), or LLaVA's
`{"from", "value"}`."""

_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}
"""LLaVA's, transformers' and ShareGPT's names of who speaks."""
_AT_LINE_START = re.compile(rf"(?m)^[ \t]*(?:{IMAGE_PLACEHOLDER}[ \t]*)+")
"""Placeholders with nothing before them on their line: where an image is put, and where nobody mentions the word."""


class EncodingError(RefusedError):
    """A conversation that cannot be trained on as it stands."""

    kind = "cannot be encoded"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message with its text. `<image>` is an image's place; a mention of the word has a mark (`data/typed.py`)."""

    role: Literal["system", "user", "assistant"]
    text: str

    @property
    def shown(self) -> str:
        """The text for a person: mentions without their marks."""
        return without_marks(self.text)

    @property
    def words(self) -> str:
        """The text for a person without the places of its images."""
        return without_marks(self.text.replace(IMAGE_PLACEHOLDER, "")).strip()


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a data set.

    Attributes:
        row_id: Names the row in every message about it.
        turns: The messages in order.
        images: Image files relative to the data source's image folder, one per placeholder.
        extra: What an evaluation needs besides (gold answer, categories).
        notes: What was mended while it was read.
        named: How messages name it: `row a (line 2)`, or `line 2` where it has no id; no part of what it says.
    """

    row_id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    named: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """How messages name the row."""
        return self.named or f"row {self.row_id:.80}"


def read_turns(messages: Sequence[Message], images: int | None = None, *, inline: bool = True) -> tuple[Turn, ...]:
    """Bring messages of either form to turns.

    What `<image>` is in a text is decided here. In messages with image parts, the parts are the images and the word is
    text. Else the user's placeholders are the images' places, where they are as many as the row has images; where they
    are more, those at the start of a line are, if these are as many, and the others are text. In other speakers' texts
    the word is text.

    LLaVA's `from`/`value` rows get LLaVA's own treatment of images (llava/train/train.py, preprocess_multimodal): a
    message's one placeholder moves to its front, on a line of its own. Several stay where they are.

    Args:
        messages: Messages with `role` and `content`, or with `from` and `value`.
        images: How many images the row names; None takes every placeholder of a user for an image's place.
        inline: Whether a placeholder inside a line can be an image's place; a table's question has none.

    Returns:
        One turn per message.

    Raises:
        EncodingError: For what is no list, an unknown role or a part that is neither text nor image.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise EncodingError(f"the messages are {messages!r:.80}; give a list of them", "malformed row")
    in_parts = any(_has_image_part(message) for message in messages)
    turns = [
        _read_turn(message, index, in_parts, may_hold_marks=images is None) for index, message in enumerate(messages)
    ]
    if not in_parts:
        turns = _separate_mentions(turns, images, inline)
    return tuple(
        Turn(turn.role, _llava_text(turn.text)) if message.get("from") is not None else turn
        for turn, message in zip(turns, messages, strict=True)
    )


def _has_image_part(message: Any) -> bool:
    content = message.get("content") if isinstance(message, Mapping) else None
    parts = content if isinstance(content, Sequence) and not isinstance(content, str) else ()
    return any(isinstance(part, Mapping) and part.get("type") in ("image", "image_url") for part in parts)


def _separate_mentions(turns: Sequence[Turn], images: int | None, inline: bool) -> list[Turn]:
    """Mark as text what `<image>` is not an image's place, as `read_turns` says."""
    asked = [turn.text for turn in turns if turn.role == "user"]
    count = sum(text.count(IMAGE_PLACEHOLDER) for text in asked)
    leading = sum(len(_leading(text)) for text in asked)
    only_leading = not inline or (images is not None and count > images and leading == images)
    return [_with_mentions(turn, only_leading) for turn in turns]


def _leading(text: str) -> list[int]:
    """Where the placeholders at starts of lines are."""
    found = []
    for line in _AT_LINE_START.finditer(text):
        found += [line.start() + match.start() for match in re.finditer(IMAGE_PLACEHOLDER, line[0])]
    return found


def _with_mentions(turn: Turn, only_leading: bool) -> Turn:
    if turn.role != "user":
        return Turn(turn.role, as_typed(turn.text, [IMAGE_PLACEHOLDER]))
    if not only_leading:
        return turn
    places, text, end = _leading(turn.text), "", 0
    for place in places:
        text += as_typed(turn.text[end:place], [IMAGE_PLACEHOLDER]) + IMAGE_PLACEHOLDER
        end = place + len(IMAGE_PLACEHOLDER)
    return Turn(turn.role, text + as_typed(turn.text[end:], [IMAGE_PLACEHOLDER]))


def _read_turn(message: Message, index: int, in_parts: bool, may_hold_marks: bool) -> Turn:
    if not isinstance(message, Mapping):
        raise EncodingError(f"message {index} is {message!r}; give an object with a role and its text", "malformed row")
    named, called = message.get("role"), message.get("from")  # a table fills what a row lacks with None
    if named is not None and called is not None:
        raise EncodingError(f"message {index} has both role and from; keep one form", "both formats")
    name = called if named is None else named
    role = _ROLES.get(str(name).lower())
    if role is None:
        raise EncodingError(f"message {index}: role is {name!r}; use one of {', '.join(_ROLES)}", "unknown role")
    content = message.get("content") if called is None else message.get("value")
    text = _text_of(content, index, [IMAGE_PLACEHOLDER] if in_parts else [], may_hold_marks)
    return Turn(role, text)  # type: ignore[arg-type]


def _text_of(content: Any, index: int, mentioned: Sequence[str], may_hold_marks: bool) -> str:
    def typed(text: str) -> str:
        if MARK in text and not may_hold_marks:
            raise EncodingError(f"message {index} holds U+FDD0, which is not a character; remove it", "malformed text")
        return as_typed(text, mentioned)

    if isinstance(content, str):
        return typed(content)
    if not isinstance(content, Sequence):
        raise EncodingError(
            f"message {index}: content is {content!r}; give a string or a list of parts", "malformed row"
        )
    text, previous = "", None
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        kind = "image" if kind == "image_url" else kind  # OpenAI's name of the part
        if kind not in ("text", "image"):
            raise EncodingError(f'message {index}: a part has type {kind!r}; use "text" or "image"', "malformed row")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise EncodingError(
                f"message {index}: a text part holds {part.get('text')!r}; give a string as its text", "malformed row"
            )
        if previous is not None and "image" in (kind, previous):
            text += "\n"
        text += IMAGE_PLACEHOLDER if kind == "image" else typed(part["text"])
        previous = kind
    return text


def _llava_text(text: str) -> str:
    if text.count(IMAGE_PLACEHOLDER) != 1:
        return text
    rest = text.replace(IMAGE_PLACEHOLDER, "").strip()
    return f"{IMAGE_PLACEHOLDER}\n{rest}".strip()


def place_image(text: str, position: ImagePosition, rng: random.Random) -> str:
    """Put a message's one image before or after its text, as the recipe says.

    Args:
        text: The text without placeholder.
        position: `first`, `last`, or `random`: a fair coin per sample, as in the LLaVA paper, section 4.2.
        rng: Throws the coin.

    Returns:
        The text with a placeholder on a line of its own.
    """
    if position == "random":
        position = "first" if rng.random() < 0.5 else "last"
    return f"{text}\n{IMAGE_PLACEHOLDER}" if position == "last" else f"{IMAGE_PLACEHOLDER}\n{text}"
