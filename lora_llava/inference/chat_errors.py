"""What the failures of a chat server mean."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime

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


def root_cause(error: BaseException) -> BaseException:
    """What an error came from in the end."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
