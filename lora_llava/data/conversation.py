"""Conversations: the form into which every data source is read, with the names of its images."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_llava.core.errors import RefusedError
from lora_llava.data.images.image_id import ImageName
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
"""Names of the roles in LLaVA, transformers and ShareGPT."""
_AT_LINE_START = re.compile(rf"(?m)^[ \t]*(?:{IMAGE_PLACEHOLDER}[ \t]*)+")
"""Placeholders at the start of a line: images are placed there, and text that mentions the word rarely is."""


class EncodingError(RefusedError):
    """A conversation that cannot be encoded."""

    kind = "cannot be encoded"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `<image>` is the place of an image; where the word is meant, it has a mark (`data/typed.py`)."""

    role: Literal["system", "user", "assistant"]
    text: str

    @property
    def shown(self) -> str:
        """The text for display, without marks."""
        return without_marks(self.text)

    @property
    def words(self) -> str:
        """The text for display, without image placeholders."""
        return without_marks(self.text.replace(IMAGE_PLACEHOLDER, "")).strip()


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a data set.

    Attributes:
        row_id: Names the row in every message about it.
        turns: The messages in order.
        images: Image files relative to the data source's image folder, one per placeholder; `ImageId` in a split of
            several sources.
        extra: What an evaluation needs in addition (gold answer, categories).
        notes: Repairs made while it was read.
        named: Its name in messages: `row a (line 2)`, or `line 2` without an id; ignored in comparisons.
    """

    row_id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageName, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    named: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """The row's name in messages."""
        return self.named or f"row {self.row_id:.80}"


def read_turns(messages: Sequence[Message], images: int | None = None, *, inline: bool = True) -> tuple[Turn, ...]:
    """Convert messages of either form to turns.

    This decides whether `<image>` in a text is an image's place or the word. In messages with image parts, the parts
    are the images and `<image>` is the word. Otherwise the user's placeholders are images' places if there are as many
    as the row has images. If there are more, those at the start of a line are images' places, if their number fits,
    and the others are words. In other roles' texts `<image>` is the word.

    LLaVA's `from`/`value` rows are treated as in LLaVA (llava/train/train.py, preprocess_multimodal): a message's
    single placeholder moves to its front, on a separate line. Several keep their places.

    Args:
        messages: Messages with `role` and `content`, or with `from` and `value`.
        images: Number of images that the row names; None treats every placeholder of a user as an image's place.
        inline: Whether a placeholder inside a line can be an image's place; in a table's question it cannot.

    Returns:
        One turn per message.

    Raises:
        EncodingError: If the messages are not a list, a role is unknown, or a part is neither text nor image.
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
    """Mark every `<image>` that is not an image's place as ordinary text; see `read_turns`."""
    questions = [turn.text for turn in turns if turn.role == "user"]
    count = sum(text.count(IMAGE_PLACEHOLDER) for text in questions)
    leading = sum(len(_leading(text)) for text in questions)
    only_leading = not inline or (images is not None and count > images and leading == images)
    return [_with_mentions(turn, only_leading) for turn in turns]


def _leading(text: str) -> list[int]:
    """Return the positions of the placeholders at the start of a line."""
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
    named, called = message.get("role"), message.get("from")  # a table has None where a row has no value
    if named is not None and called is not None:
        raise EncodingError(f"message {index} has both role and from; keep one", "both formats")
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
                f"message {index}: a text part is {part.get('text')!r}; give a string as its text", "malformed row"
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
    """Place a message's single image before or after its text.

    Args:
        text: The text without placeholder.
        position: `first`, `last`, or `random`: a fair coin per sample, as in the LLaVA paper, section 4.2.
        rng: Throws the coin.

    Returns:
        The text with a placeholder on a separate line.
    """
    if position == "random":
        position = "first" if rng.random() < 0.5 else "last"
    return f"{text}\n{IMAGE_PLACEHOLDER}" if position == "last" else f"{IMAGE_PLACEHOLDER}\n{text}"
