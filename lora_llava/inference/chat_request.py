"""What is asked of a chat server, and what comes back."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

_LARGE = 1024 * 1024
"""Pixels from which an image goes as JPEG: a photograph of that size is megabytes as PNG."""


@dataclass(frozen=True)
class ChatRequest:
    """One question.

    Attributes:
        messages: In OpenAI's form, `{"role", "content"}`; content is a text or a list of parts, see `image_part`.
        max_tokens: Longest answer.
        temperature: 0 is greedy; None leaves it to the server, as some models demand.
        top_p: Share of the probability that tokens are drawn from.
        stop: Ends an answer.
        seed: Of what is drawn, where the server heeds it.
        response_format: Such as `{"type": "json_schema", ...}`; left out for a server that does not know it.
        key: Sent as `Idempotency-Key`: a server that heeds it answers and charges the same request once.
    """

    messages: list[dict[str, Any]]
    max_tokens: int
    temperature: float | None = 0.0
    top_p: float = 1.0
    stop: str | None = None
    seed: int | None = None
    response_format: dict[str, Any] | None = None
    key: str | None = None

    def settings(self) -> dict[str, Any]:
        """What is sent beside the messages and the model's name."""
        values: dict[str, Any] = {
            "max_tokens": self.max_tokens, "temperature": self.temperature, "stop": self.stop, "seed": self.seed,
            "response_format": self.response_format,
        }  # fmt: skip
        if self.top_p != 1:
            values["top_p"] = self.top_p
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class ChatAnswer:
    """What came back.

    Attributes:
        text: The answer.
        prompt_tokens: As the server counts them; 0 where it does not.
        completion_tokens: The same of the answer.
        model: As the server names it.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    model: str


@dataclass(frozen=True)
class ChatFailure:
    """A request, or one try at it, without an answer.

    Attributes:
        reason: In a few words, such as `no answer within 60 s`.
        prompt_tokens: What the last try cost by the server's count, 0 where the server refused it unread; None where
            nobody knows.
        completion_tokens: The same of what came back.
    """

    reason: str
    prompt_tokens: int | None = field(default=None, compare=False)
    completion_tokens: int | None = field(default=None, compare=False)


def image_part(image: Image.Image) -> dict[str, Any]:
    """An image as a part of a message's content.

    Args:
        image: Any mode; sent in RGB.

    Returns:
        An `image_url` part with the image in a data URL: PNG, which changes no pixel, or JPEG of quality 95 above
        1024 x 1024 pixels.
    """
    kind = "jpeg" if image.width * image.height > _LARGE else "png"
    stream = io.BytesIO()
    image.convert("RGB").save(stream, format=kind, **({"quality": 95} if kind == "jpeg" else {}))
    content = base64.b64encode(stream.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{content}"}}
