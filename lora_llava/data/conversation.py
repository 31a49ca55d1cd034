"""What every data source becomes: a conversation, with the names of its pictures."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_llava.errors import RefusedError

IMAGE_PLACEHOLDER = "<image>"
ImagePosition = Literal["first", "last", "random", "as_written"]
Message = Mapping[str, Any]
"""`{"role", "content"}` as in transformers (content a string, or parts of type text and image), or LLaVA's
`{"from", "value"}`."""

_ROLES = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system",
}  # fmt: skip
"""LLaVA's, transformers' and ShareGPT's names of who speaks."""


class EncodingError(RefusedError):
    """A conversation that cannot be trained on as it stands."""

    kind = "cannot be encoded"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message with its text; `<image>` stands for a picture."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a data set.

    Attributes:
        row_id: Names the row in every message about it.
        turns: The messages in order.
        images: Picture files relative to the data source's image folder, one per placeholder.
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


def read_turns(messages: Sequence[Message]) -> tuple[Turn, ...]:
    """Bring messages of either form to turns.

    LLaVA's `from`/`value` rows get LLaVA's own treatment of pictures (llava/train/train.py,
    preprocess_multimodal): a message's one placeholder moves to its front, on a line of its own. Several stay where
    they stand, which says what each picture is.

    Args:
        messages: Messages with `role` and `content`, or with `from` and `value`.

    Returns:
        One turn per message.

    Raises:
        EncodingError: For what is no list, an unknown role or a part that is neither text nor image.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise EncodingError(f"the messages are {messages!r:.80}; give a list of them", "malformed row")
    return tuple(_read_turn(message, index) for index, message in enumerate(messages))


def _read_turn(message: Message, index: int) -> Turn:
    if not isinstance(message, Mapping):
        raise EncodingError(f"message {index} is {message!r}; give an object with a role and its text", "malformed row")
    named, called = message.get("role"), message.get("from")  # a table fills what a row lacks with None
    if named is not None and called is not None:
        raise EncodingError(f"message {index} has both role and from; keep one form", "both formats")
    name = called if named is None else named
    role = _ROLES.get(str(name).lower())
    if role is None:
        raise EncodingError(f"message {index}: role is {name!r}; use one of {', '.join(_ROLES)}", "unknown role")
    if called is not None:
        return Turn(role, _llava_text(_text_of(message.get("value"), index)))  # type: ignore[arg-type]
    return Turn(role, _text_of(message.get("content"), index))  # type: ignore[arg-type]


def _text_of(content: Any, index: int) -> str:
    if isinstance(content, str):
        return content
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
        text += IMAGE_PLACEHOLDER if kind == "image" else part["text"]
        previous = kind
    return text


def _llava_text(text: str) -> str:
    if text.count(IMAGE_PLACEHOLDER) != 1:
        return text
    rest = text.replace(IMAGE_PLACEHOLDER, "").strip()
    return f"{IMAGE_PLACEHOLDER}\n{rest}".strip()


def place_image(text: str, position: ImagePosition, rng: random.Random) -> str:
    """Put a message's one picture before or after its text, as the recipe says.

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
