"""Detect the encoding of a text file: UTF-8, UTF-16 or cp1252, by its byte order mark or its bytes."""

from __future__ import annotations

import codecs
import re
from functools import lru_cache
from pathlib import Path

_CHUNK = 1 << 20
_SAMPLE = 1 << 16
_UTF16_ZEROS = 0.02
"""Share of zero bytes from which valid UTF-8 is treated as UTF-16: in Cyrillic only its spaces have them."""
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_NOT_CP1252 = re.compile(
    rb"[\x00-\x08\x0e-\x1f\x7f\x81\x8d\x8f\x90\x9d\xff]"  # not used in text, or not defined
    rb"|([\x80-\xff])(?!\1)[\x80-\xff]{3}"  # words of high bytes: Cyrillic, Greek, Chinese, Japanese, Korean
    rb"|[A-Za-z\xc0-\xfe][\xa3\xb1-\xb6\xb8-\xba\xbc-\xbf][A-Za-z\xc0-\xfe]"  # signs within a word: letters of cp1250
    rb"|[a-z][\x82-\x84\x86-\x8c\x8e\x93-\x95\x98\x99\x9b\x9f][a-z]"  # likewise: letters of Mac Roman
)
"""Byte sequences that do not occur in cp1252 text (Windows' Western European, which includes Latin-1)."""


def text_encoding(file: Path) -> str:
    """Return the encoding of a text file; the complete file is read once, in chunks.

    Args:
        file: CSV, TSV, JSON or JSONL.

    Returns:
        A codec's name: `utf-8-sig` (also for plain UTF-8), `utf-16`, `utf-16-le`, `utf-16-be` or `cp1252`; if none
        fits, the one that fails, and `encoding_problem` returns where.
    """
    return _detect(file)[0]


def encoding_problem(file: Path) -> str | None:
    """Return why a text file cannot be decoded, with the position of the first invalid byte; None if it can."""
    return _detect(file)[1]


def foreign_encoding(file: Path) -> str | None:
    """Return the display name of the encoding if the file can be decoded and is not UTF-8, else None."""
    encoding, problem = _detect(file)
    if problem is not None:
        return None
    return None if encoding == "utf-8-sig" else encoding.upper() if encoding.startswith("utf") else encoding


def _detect(file: Path) -> tuple[str, str | None]:
    state = file.stat()
    return _found(file, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _found(file: Path, size: int, changed: int) -> tuple[str, str | None]:
    """Return the encoding and the problem of a file; its size and time of change are part of the cache's key."""
    with file.open("rb") as stream:
        sample = stream.read(_SAMPLE)
    named = next((encoding for mark, encoding in _MARKS if sample.startswith(mark)), None) or _utf16_by_zeros(sample)
    place, reason = _first_error(file, named or "utf-8-sig")
    if reason is None:
        return named or "utf-8-sig", None
    if named is None and _is_cp1252(file):
        return "cp1252", None
    kind = "UTF-16, which its first bytes indicate" if named and named.startswith("utf-16") else "UTF-8"
    return named or "utf-8-sig", f"not {kind}: {reason} at byte {place}; save it as UTF-8"


def _utf16_by_zeros(sample: bytes) -> str | None:
    """Detect UTF-16 without a byte order mark: every ASCII character has a zero byte, always on the same side."""
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if not even and not odd:
        return None
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        enough = 1
    else:
        enough = max(2, int(_UTF16_ZEROS * len(sample)))
    if odd >= enough and odd > 4 * even:
        return "utf-16-le"
    if even >= enough and even > 4 * odd:
        return "utf-16-be"
    return None


def _first_error(file: Path, encoding: str) -> tuple[int, str | None]:
    """Return the position of the first byte that is invalid in an encoding, and the reason; None if all are valid."""
    decoder = codecs.getincrementaldecoder(encoding)()
    place = waiting = 0
    with file.open("rb") as stream:
        while True:
            chunk = stream.read(_CHUNK)
            pending = decoder.getstate()[0]
            waiting = len(pending)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return place - waiting + error.start, error.reason
            if not chunk:
                return place, None
            place += len(chunk)


def _is_cp1252(file: Path) -> bool:
    """Check whether a file that is not UTF-8 is Western European text, not UTF-8 with a few damaged bytes."""
    high = whole = 0
    tail = b""
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            if _NOT_CP1252.search(tail + chunk):
                return False
            tail = chunk[-3:]
            ascii_only = len(chunk.translate(None, bytes(range(0x80, 0x100))))
            high += len(chunk) - ascii_only
            whole += len(chunk.decode("utf-8", "ignore")) - ascii_only
    return 8 * whole <= high
