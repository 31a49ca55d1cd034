"""Errors that a person can mend: one line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ToldError(Exception):
    """An end that is told in its message, without traceback."""

    exit_code = 1


class StoppedError(ToldError):
    """A signal stopped the run; the message says how to go on.

    Args:
        message: Where it stopped, and how to go on.
        number: Of the signal: 2 for Ctrl-C.
    """

    def __init__(self, message: str, number: int = 2) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # as shells tell of a process that a signal ended


class UserError(ToldError):
    """A mistake in a recipe, a file or a call: one line that names the field or file, the value and the mend."""

    exit_code = 2


class RefusedError(UserError):
    """A row or image that cannot be used.

    Args:
        message: What is wrong.
        kind: The same in a word or two, under which such are counted; default: the class's own.
    """

    kind = "unusable"

    def __init__(self, message: str, kind: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind or self.kind


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ` (did you mean "batch_size"?)`, or nothing where no known name is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f' (did you mean "{matches[0]}"?)' if matches else ""
