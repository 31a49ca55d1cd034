"""Read JSON values from a text stream one at a time, each of limited length."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

LONGEST = 16 << 20
"""Most characters of a row: a thousand times what a model reads. Reading a row takes four times its length."""
_CHUNK = 1 << 20
_SIGNS = 16
"""More characters than a number, a word or an escape can have before the end of a chunk cuts it."""
_BLANKS = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_BEGINNINGS = {word[:size] for word in (*_WORDS, ".", "e+", "e-", "E+", "E-") for size in range(1, len(word) + 1)}
"""Possible beginnings of a value at the end of a truncated file."""


class TooLongError(ValueError):
    """A row is longer than `LONGEST`."""

    def __init__(self) -> None:
        super().__init__(f"a row of more than {LONGEST:,} characters; store data that is not text in separate files")


class RepeatedKeyError(ValueError):
    """An object names a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r:.80} appears twice in one object; keep one")


class MoreTextError(ValueError):
    """More text follows the end of the JSON value."""


class NotFiniteError(ValueError):
    """A value is NaN or an infinity, which JSON does not define."""


def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object and refuse repeated keys: the decoder would silently drop the first value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise RepeatedKeyError(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return found


def array_items(reader: JsonStream, key: str, to_end: bool = True) -> Iterator[Any]:
    """Yield the elements of the array under a key of the outer object, one at a time.

    All other values are skipped; of a value of another kind under the key, nothing is yielded.

    Args:
        reader: At the start of its text.
        key: Key of the array.
        to_end: Whether to check the rest of the text after the array, too.

    Raises:
        ValueError: If the text is not one JSON object; see `JsonStream`.
    """
    for name in reader.members():
        if name != key or reader.peek() != "[":
            reader.skip()
            continue
        for _ in reader.elements():
            yield reader.decode()
        if not to_end:
            return
    reader.finish("object")


def object_entries(reader: JsonStream) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of the outer object, one at a time.

    Raises:
        ValueError: If the text is not one JSON object; see `JsonStream`.
    """
    for name in reader.members():
        yield name, reader.decode()
    reader.finish("object")


def is_cut(error: json.JSONDecodeError) -> bool:
    """Check whether an error of a `JsonStream` is the end of a truncated text."""
    rest = error.doc[error.pos :].strip()
    half_escape = error.msg.startswith("Invalid \\u") and len(rest) <= len("\\uXXXX")
    return not rest or rest in _BEGINNINGS or half_escape or error.msg.startswith("Unterminated string")


def first_line(error: ValueError) -> str:
    """Return an error's message in one line, without its place and Python's advice on long numbers."""
    return str(getattr(error, "msg", error)).splitlines()[0].partition("; use sys.")[0]


class JsonStream:
    """A text stream from which JSON values are read one by one.

    Besides `json.JSONDecodeError`, the methods raise `TooLongError` and `RepeatedKeyError`.

    Args:
        stream: Text stream.
        strict: Whether to refuse NaN and infinities with `NotFiniteError`, and text with half of a surrogate pair with
            `UnicodeEncodeError`.
    """

    def __init__(self, stream: Any, strict: bool = False) -> None:
        self.stream, self.strict, self.text, self.place, self.line = stream, strict, "", 0, 1
        self.decoder = json.JSONDecoder(
            object_pairs_hook=keys_once, parse_constant=_refuse_constant if strict else None
        )

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        if self.place < len(self.text) and self.text[self.place] not in " \t\r\n":
            return self.text[self.place]  # without the cost of the pattern
        while True:
            end = _BLANKS.match(self.text, self.place).end()  # type: ignore[union-attr]
            if end > self.place:
                self.line += self.text.count("\n", self.place, end)
                self.place = end
            if end < len(self.text):
                return self.text[end]
            if not self._read(_CHUNK):
                return ""

    def expect(self, sign: str, problem: str) -> None:
        """Pass over a character after any white space, or raise an error."""
        if self.peek() != sign:
            while len(self.text) - self.place < _SIGNS and self._read(_CHUNK):
                pass  # so that `is_cut` sees what follows
            raise json.JSONDecodeError(problem, self.text, self.place)
        self.place += 1

    def finish(self, ended: str) -> None:
        """Check that no more text follows.

        Raises:
            MoreTextError: If text follows; the message names what ended.
        """
        if self.peek():
            raise MoreTextError(f"not JSON: more text follows the end of the {ended}")

    def elements(self) -> Iterator[int]:
        """Walk through the array that starts here.

        Yields:
            The index of each element. The reader is then at the element, and the caller decodes or skips it.
        """
        self.expect("[", "Expecting an array")
        index = 0
        while self.peek() != "]":
            if index:
                self.expect(",", "Expecting ',' delimiter")
                self.peek()
            yield index
            index += 1
        self.place += 1

    def members(self) -> Iterator[str]:
        """Walk through the object that starts here.

        Yields:
            The key of each value. The reader is then at the value, and the caller decodes or skips it.
        """
        self.expect("{", "Expecting an object")
        found: set[str] = set()
        while self.peek() != "}":
            if found:
                self.expect(",", "Expecting ',' delimiter")
            self.expect('"', "Expecting property name enclosed in double quotes")
            self.place -= 1
            key = self.decode()
            if key in found:
                raise RepeatedKeyError(key)
            found.add(key)
            self.expect(":", "Expecting ':' delimiter")
            self.peek()
            yield key
        self.place += 1

    def skip(self) -> None:
        """Pass over the value that starts here; an array or object is never completely in memory."""
        opening = self.peek()
        if opening in ("[", "{"):
            for _ in self.elements() if opening == "[" else self.members():
                self.decode()
        else:
            self.decode()

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
            if self.strict and _SURROGATE.search(self.text, self.place, end):
                json.dumps(value, ensure_ascii=False).encode()
            self.line += self.text.count("\n", self.place, end)
            self.place = end
            return value

    def _read(self, size: int) -> bool:
        new = self.stream.read(size)
        if new:
            self.text, self.place = self.text[self.place :] + new, 0
        return bool(new)


def _refuse_constant(name: str) -> NoReturn:
    raise NotFiniteError(f"{name} is not a number of JSON")
