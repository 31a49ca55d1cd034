"""Requests to a chat server, their answers and failures."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

_LARGE = 1024 * 1024
"""Pixels above which an image is sent as JPEG: a photograph of that size takes megabytes as PNG."""


@dataclass(frozen=True)
class ChatRequest:
    """One request.

    Attributes:
        messages: In OpenAI's form, `{"role", "content"}`; the content is a text or a list of parts, see `image_part`.
        max_tokens: Most tokens of the answer.
        temperature: 0 is greedy; None omits it, as some models require.
        top_p: Probability mass of nucleus sampling.
        stop: Text that ends the answer.
        seed: Of sampling, if the server supports it.
        response_format: Such as `{"type": "json_schema", ...}`; omitted for a server that does not support it.
        key: Sent as `Idempotency-Key`; a server that supports it answers and charges the same request once.
        logprobs: Whether to ask for the log-probability of each token of the answer.
    """

    messages: list[dict[str, Any]]
    max_tokens: int
    temperature: float | None = 0.0
    top_p: float = 1.0
    stop: str | None = None
    seed: int | None = None
    response_format: dict[str, Any] | None = None
    key: str | None = None
    logprobs: bool = False

    def settings(self) -> dict[str, Any]:
        """Return the fields of the request's body besides the messages and the model's name."""
        values: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stop": self.stop,
            "seed": self.seed,
            "response_format": self.response_format,
        }
        if self.top_p != 1:
            values["top_p"] = self.top_p
        if self.logprobs:
            values["logprobs"] = True
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class ChatAnswer:
    """An answer.

    Attributes:
        text: The text of the answer.
        prompt_tokens: The server's count; 0 if it reports none.
        completion_tokens: The server's count for the answer; 0 if it reports none.
        model: The name that the server reports.
        finish: Why the answer ended, as the server reports it: `stop` or `length`; None if it does not.
        logprobs: Log-probability of each token of the answer, in nats; None if the server reports none.
        token_ids: Ids of the answer's tokens; None if the server reports none.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    model: str
    finish: str | None = field(default=None, compare=False)
    logprobs: tuple[float, ...] | None = field(default=None, compare=False)
    token_ids: tuple[int, ...] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class ChatFailure:
    """A request, or one try of it, that was not answered.

    Attributes:
        reason: In a few words, such as `no answer within 60 s`.
        prompt_tokens: The server's count for the last try; 0 if the request was refused before it was processed; None
            if unknown.
        completion_tokens: The same for the answer.
    """

    reason: str
    prompt_tokens: int | None = field(default=None, compare=False)
    completion_tokens: int | None = field(default=None, compare=False)


def image_part(image: Image.Image) -> dict[str, Any]:
    """Encode an image as a part of a message's content.

    Args:
        image: In any mode; converted to RGB.

    Returns:
        An `image_url` part with the image in a data URL: PNG, which is lossless, or JPEG of quality 95 above
        1024 x 1024 pixels.
    """
    kind = "jpeg" if image.width * image.height > _LARGE else "png"
    stream = io.BytesIO()
    image.convert("RGB").save(stream, format=kind, **({"quality": 95} if kind == "jpeg" else {}))
    content = base64.b64encode(stream.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{content}"}}
