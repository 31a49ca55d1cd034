"""Interpret the failures of a chat server."""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import openai

_LONGEST_RETRY_AFTER = 120.0
"""Seconds; a longer wait that a server asks for counts as a refusal. The openai library uses the same limit."""
_TEMPORARY = {408, 409, 425, 429}
"""Statuses besides 5xx after which HTTP allows another try: timeout, conflict, too early, too many requests."""


def rejects_response_format(error: openai.APIStatusError, reason: str) -> bool:
    """Check whether a server refused a request because of its `response_format`, judging by its message."""
    names = ("response_format", "json_schema", "guided", "grammar", "structured")
    return error.status_code in (400, 422, 501) and any(name in reason for name in names)


def retry_after(error: openai.APIStatusError) -> float | None:
    """Return the seconds to wait before another try, 0 if the server names none; None if another try is useless."""
    if error.status_code not in _TEMPORARY and error.status_code < 500:
        return None
    header = error.response.headers.get("retry-after", "")
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return 0.0
    if not seconds <= _LONGEST_RETRY_AFTER:
        return None
    return max(seconds, 0.0)


Usage = tuple[int | None, int | None]
"""Prompt and completion tokens; None where unknown."""


def reported_usage(content: Any) -> Usage:
    """Read the token counts that a server reports.

    Args:
        content: The answer as parsed JSON, of any type.

    Returns:
        The counts in its `usage`; None for an invalid count and for 0 prompt tokens.
    """
    usage = content.get("usage") if isinstance(content, Mapping) else None
    found = [usage.get(name) if isinstance(usage, Mapping) else None for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (count if type(count) is int and count >= 0 else None for count in found)
    return prompt or None, completion


Details = tuple[str | None, tuple[float, ...] | None, tuple[int, ...] | None]
"""Why an answer ended, the log-probabilities of its tokens and their ids; None for what is not reported."""


def reported_details(content: Any) -> Details:
    """Read what a server reports about an answer's tokens.

    vLLM gives ids as `token_ids` of the choice (with `return_token_ids`), llama.cpp as `id` of each log-probability.
    """
    choice = content["choices"][0]
    finish, ids = choice.get("finish_reason"), choice.get("token_ids")
    try:
        tokens = choice["logprobs"]["content"]
        logprobs = tuple(float(token["logprob"]) for token in tokens)
        ids = ids or [token.get("id") for token in tokens]
    except (AttributeError, KeyError, TypeError, ValueError):
        logprobs = ()
    known = isinstance(ids, list) and bool(ids) and all(type(token) is int for token in ids)
    return finish if isinstance(finish, str) else None, logprobs or None, tuple(ids) if known else None


class NoAnswerError(Exception):
    """A response without a usable answer; the message gives the reason.

    Attributes:
        usage: Tokens that it cost nevertheless.
    """

    def __init__(self, reason: str, usage: Usage = (None, None)) -> None:
        super().__init__(reason)
        self.usage = usage


def text_of(found: Any) -> str:
    """Return the text of a chat completion.

    Raises:
        NoAnswerError: If it has none.
    """
    usage = reported_usage(found)
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


def usage_of_refusal(error: openai.APIStatusError) -> Usage:
    """Return the tokens that a refusal cost: the reported counts, else 0 for a request that was not accepted (4xx), and
    unknown if the server failed at it (5xx) or ran out of time (408)."""
    try:
        usage = reported_usage(error.response.json())
    except (ValueError, RecursionError):
        usage = (None, None)
    if usage != (None, None) or error.status_code == 408 or not 400 <= error.status_code < 500:
        return usage
    return 0, 0


def root_cause(error: BaseException) -> BaseException:
    """Return the first error of a chain; in a group of errors (one per address of a host), follow its first.

    Contexts are followed where no cause is set: httpcore raises its errors `from None`.
    """
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif (before := error.__cause__ or error.__context__) is not None:
            error = before
        else:
            return error
