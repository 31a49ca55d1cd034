"""A chat server and how to send requests to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from lora_llava.core.errors import UserError

_DAY = 86_400
NO_KEY = "no-key"
"""Sent to servers that need no key, because the openai library requires one."""


@dataclass(frozen=True)
class ChatServer:
    """A chat server and how to send requests to it.

    Attributes:
        url: The API's base URL, such as `http://localhost:8000/v1`; `/v1` is added to a URL without a path.
        model: The model's name on the server; None selects the only one.
        api_key: Default: the environment variable OPENAI_API_KEY, or a placeholder. Never printed.
        concurrency: Most requests in flight at once.
        timeout: Seconds within which an answer must be complete.
        retries: Further tries after a failure that may be temporary.
        refuse_empty: Whether an empty answer counts as a failure.
        requests_per_minute: Most requests per minute, evenly spread; None means no limit.
        pause: Seconds before the first further try, doubled after each, up to 30.
        reconnect: Seconds for which a server that was down after it had answered is waited for, for each request; the
            tries that this takes do not count as retries.
        fields: Further fields of every request's body, such as vLLM's `add_special_tokens`.

    Raises:
        UserError: For an invalid value.
    """

    url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 4
    refuse_empty: bool = False
    requests_per_minute: int | None = None
    pause: float = 0.5
    reconnect: float = 600.0
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _api_url(self.url))
        if self.concurrency < 1:
            raise UserError(f"concurrency is {self.concurrency}; give 1 or more")
        if not 0 < self.timeout <= _DAY:
            raise UserError(f"timeout is {self.timeout:g}; give a number of seconds above 0, at most {_DAY:,} (a day)")
        if self.requests_per_minute is not None and self.requests_per_minute < 1:
            raise UserError(f"requests_per_minute is {self.requests_per_minute}; give 1 or more")
        if not 0 <= self.reconnect <= _DAY:
            raise UserError(f"reconnect is {self.reconnect:g}; give a number of seconds from 0 to {_DAY:,} (a day)")
        if self.retries < 0:
            raise UserError(f"retries is {self.retries}; give 0 or more")
        if not self.key.isascii() or not self.key.isprintable():
            raise UserError("the API key contains characters that are invalid in a key; set OPENAI_API_KEY again")

    @property
    def key(self) -> str:
        """The API key to send."""
        return (self.api_key or os.environ.get("OPENAI_API_KEY") or "").strip() or NO_KEY


def _api_url(url: str) -> str:
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"the server's URL is {url!r}; give one such as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query:
        raise UserError("the server's URL contains a password or a query; remove it, and set the key in OPENAI_API_KEY")
    path = parts.path.rstrip("/") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path.removesuffix('/chat/completions')}"
