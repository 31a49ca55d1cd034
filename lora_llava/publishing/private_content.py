"""Scan files before an upload for secrets and for paths that identify a person."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_token

from lora_llava.core.secrets import TOKENS

_HOMES = rb"(?:(?<![\w./-])|file://)/(?:home/|Users/|root\b)|\b[A-Za-z]:[\\/]{1,4}Users[\\/]"
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD)$")
LOCAL_PATH = rb"[\s\":(\[=](?:/(?:[\w.+-]+/)+[\w.+-]+|[A-Za-z]:\\[\w.+-]+\\)"
"""An absolute path, which no generated file should contain."""
_SHORTEST_SECRET = 8


@dataclass(frozen=True)
class Leak:
    """Something that must not be uploaded, by kind and without its text.

    Attributes:
        file: Name of the file.
        line: Line number, from 1.
        what: The kind of finding.
    """

    file: str
    line: int
    what: str


def scan(file: str, content: bytes, *, written_by_us: bool = False) -> list[Leak]:
    """Search a file for tokens, secrets of this machine and paths into home folders.

    Args:
        file: Name of the file, for the findings.
        content: Its complete content; for a weight file, the header.
        written_by_us: Whether the file is generated, so that any absolute path is a finding.

    Returns:
        The findings, in order.
    """
    patterns = TOKENS | {"a path into a home": _HOMES} | _own_secrets()
    if written_by_us:
        patterns |= {"a local path": LOCAL_PATH}
    found = set()
    for what, pattern in patterns.items():
        for match in re.finditer(pattern, content):
            found.add((content.count(b"\n", 0, match.start()) + 1, what))
    return [Leak(file, line, what) for line, what in sorted(found)]


def _own_secrets() -> dict[str, bytes]:
    """Return patterns of the secrets of this machine."""
    values = {f"the value of {name}": value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    values["this machine's Hub token"] = get_token() or ""
    patterns = {what: re.escape(value).encode() for what, value in values.items() if len(value) >= _SHORTEST_SECRET}
    return patterns | {"a path into this home": rb"(?<![\w.-])" + re.escape(f"{Path.home()}/").encode()}
