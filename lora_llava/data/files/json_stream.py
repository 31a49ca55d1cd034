"""JSON values out of a text stream, one at a time, each of a length that memory holds."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

LONGEST = 16 << 20
"""Characters of one row: a thousand times what a model reads; a row takes four times its length while it is read."""
_CHUNK = 1 << 20
_SIGNS = 16
"""More than a number, a word or an escape that a piece's end cuts has before the cut."""


class TooLongError(ValueError):
    """A row is longer than `LONGEST`."""

    def __init__(self) -> None:
        super().__init__(f"a row of more than {LONGEST:,} characters; put what is not text into files of its own")


class RepeatedKeyError(ValueError):
    """An object names a key twice."""


def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand there once: of two values the decoder would drop the first in silence."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RepeatedKeyError(f"the key {twice!r:.80} stands there twice in one object; keep one")
    return found


class JsonStream:
    """A text stream from which JSON values are taken one by one."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.text, self.place, self.line = stream, "", 0, 1
        self.decoder = json.JSONDecoder(object_pairs_hook=keys_once)

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in " \t\r\n":
                self.line += self.text[self.place] == "\n"
                self.place += 1
            if self.place < len(self.text):
                return self.text[self.place]
            if not self._read(_CHUNK):
                return ""

    def take(self, count: int) -> None:
        self.place += count

    def decode(self) -> Any:
        """The JSON value that starts here; more is read until it is whole."""
        size = _CHUNK
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                # Only what is wrong at the text's end may be right with more of it.
                at_end = error.pos > len(self.text) - _SIGNS or error.msg.startswith("Unterminated string")
                if at_end and len(self.text) - self.place > LONGEST:
                    raise TooLongError from None
                if at_end and self._read(size):
                    size *= 2
                    continue
                self.line += self.text.count("\n", self.place, error.pos)
                raise
            # A bare number may go on: in "1.", 1 is whole, and the point is not yet what 5 makes of it.
            unsure = len(self.text) - end < _SIGNS if isinstance(value, (int, float)) else end == len(self.text)
            if unsure and self._read(size):
                continue
            self.line += self.text.count("\n", self.place, end)
            self.place = end
            return value

    def _read(self, size: int) -> bool:
        new = self.stream.read(size)
        if new:
            self.text, self.place = self.text[self.place :] + new, 0
        return bool(new)
