"""Errors that a person can fix: one line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ReportedError(Exception):
    """An error that is reported by its message, without a traceback."""

    exit_code = 1


class StoppedError(ReportedError):
    """A run stopped by a signal.

    Args:
        message: Where it stopped, and how to resume it.
        number: The signal's number: 2 for Ctrl-C.
    """

    def __init__(self, message: str, number: int = 2) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # as shells report a process that a signal ended


class UserError(ReportedError):
    """A mistake in a recipe, a file or a call: one line that names the field or file, the value and the fix."""

    exit_code = 2


class RefusedError(UserError):
    """A row or image that cannot be used.

    Args:
        message: What is wrong.
        kind: The reason in a word or two, by which such rows are counted; default: the class's `kind`.
    """

    kind = "unusable"

    def __init__(self, message: str, kind: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind or self.kind


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as ` (did you mean "batch_size"?)`; an empty text if no known name is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f' (did you mean "{matches[0]}"?)' if matches else ""
