"""What the failures of a chat server mean."""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import openai

_LONGEST_RETRY_AFTER = 120.0
"""Seconds; a server that asks for a longer wait is not waited for. The openai library draws the same line."""
_PASSING = {408, 409, 425, 429}
"""Besides 5xx, what HTTP lets a client try again: timeout, conflict, too early, too many requests."""


def knows_no_format(error: openai.APIStatusError, reason: str) -> bool:
    """Whether a server refused a request for the form that was asked for, by what it says."""
    told = ("response_format", "json_schema", "guided", "grammar", "structured")
    return error.status_code in (400, 422, 501) and any(word in reason for word in told)


def retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds that a server asks to wait, 0 where it does not say; None where trying again is of no use."""
    if error.status_code not in _PASSING and error.status_code < 500:
        return None
    told = error.response.headers.get("retry-after", "")
    try:
        seconds = float(told)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(told).timestamp() - time.time()
        except ValueError:
            return 0.0
    if not seconds <= _LONGEST_RETRY_AFTER:
        return None
    return max(seconds, 0.0)


Usage = tuple[int | None, int | None]
"""Tokens to the model and from it; None where they are not known."""


def told_usage(content: Any) -> Usage:
    """Tokens that a server says it used.

    Args:
        content: Its answer as JSON, whatever that is.

    Returns:
        By its `usage`; a count that cannot be, or 0 to the model, is none.
    """
    usage = content.get("usage") if isinstance(content, Mapping) else None
    found = [usage.get(name) if isinstance(usage, Mapping) else None for name in ("prompt_tokens", "completion_tokens")]
    sent, came = (count if type(count) is int and count >= 0 else None for count in found)
    return sent or None, came


class NoAnswerError(Exception):
    """What came is no answer; the message says why.

    Attributes:
        usage: What it cost all the same.
    """

    def __init__(self, reason: str, usage: Usage = (None, None)) -> None:
        super().__init__(reason)
        self.usage = usage


def text_of(found: Any) -> str:
    """The text of a chat completion.

    Raises:
        NoAnswerError: Where there is none.
    """
    usage = told_usage(found)
    if not isinstance(found, dict):
        raise NoAnswerError("malformed answer: no chat completion", usage)
    if not found.get("choices"):
        raise NoAnswerError("malformed answer: no choices", usage)
    try:
        text = found["choices"][0]["message"].get("content") or ""
    except (AttributeError, TypeError, KeyError, IndexError):
        raise NoAnswerError("malformed answer: no message", usage) from None
    if not isinstance(text, str):
        raise NoAnswerError("malformed answer: no text", usage)
    return text


def refused_usage(error: openai.APIStatusError) -> Usage:
    """Tokens that a refusal cost: what it says, else none for a request that was not let in (4xx), and nobody knows
    for one at which the server failed (5xx) or for which it took too long (408)."""
    try:
        told = told_usage(error.response.json())
    except (ValueError, RecursionError):
        told = (None, None)
    if told != (None, None) or error.status_code == 408 or not 400 <= error.status_code < 500:
        return told
    return 0, 0


def root_cause(error: BaseException) -> BaseException:
    """What an error came from in the end."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
