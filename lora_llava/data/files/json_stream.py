"""Read JSON values from a text stream one at a time, each of limited length."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

LONGEST = 16 << 20
"""Most characters of a row: a thousand times what a model reads. Reading a row takes four times its length."""
_CHUNK = 1 << 20
_SIGNS = 16
"""More characters than a number, a word or an escape can have before the end of a chunk cuts it."""


class TooLongError(ValueError):
    """A row is longer than `LONGEST`."""

    def __init__(self) -> None:
        super().__init__(f"a row of more than {LONGEST:,} characters; store data that is not text in separate files")


class RepeatedKeyError(ValueError):
    """An object names a key twice."""


def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object and refuse repeated keys: the decoder would silently drop the first value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RepeatedKeyError(f"the key {twice!r:.80} appears twice in one object; keep one")
    return found


class JsonStream:
    """A text stream from which JSON values are read one by one."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.text, self.place, self.line = stream, "", 0, 1
        self.decoder = json.JSONDecoder(object_pairs_hook=keys_once)

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end."""
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
        """Decode the JSON value that starts here, reading more until it is complete."""
        size = _CHUNK
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                # Only an error at the end of the text may be resolved by reading more.
                at_end = error.pos > len(self.text) - _SIGNS or error.msg.startswith("Unterminated string")
                if at_end and len(self.text) - self.place > LONGEST:
                    raise TooLongError from None
                if at_end and self._read(size):
                    size *= 2
                    continue
                self.line += self.text.count("\n", self.place, error.pos)
                raise
            # A number at the end may be incomplete: "1." decodes as 1, but the file may have "1.5".
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
