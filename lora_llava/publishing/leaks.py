"""Nothing that identifies a person or opens an account leaves: a scan of everything that is to be uploaded."""

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
"""An absolute path, which nothing that we write ourselves should hold."""
_SHORTEST_SECRET = 8


@dataclass(frozen=True)
class Finding:
    """Something that should not leave; what it is, never what it says.

    Attributes:
        file: Name of the file.
        line: Line in it, from 1.
        what: Its kind.
    """

    file: str
    line: int
    what: str


def scan(file: str, content: bytes, *, written_by_us: bool = False) -> list[Finding]:
    """Look for tokens, this machine's secrets and paths into people's homes.

    Args:
        file: Its name, for the finding.
        content: All of it; of a weight file, its header.
        written_by_us: Look for any absolute path too.

    Returns:
        What was found, in order.
    """
    patterns = TOKENS | {"a path into a home": _HOMES} | _own_secrets()
    if written_by_us:
        patterns |= {"a local path": LOCAL_PATH}
    found = set()
    for what, pattern in patterns.items():
        for match in re.finditer(pattern, content):
            found.add((content.count(b"\n", 0, match.start()) + 1, what))
    return [Finding(file, line, what) for line, what in sorted(found)]


def _own_secrets() -> dict[str, bytes]:
    """Patterns of what is secret on this machine alone."""
    values = {f"the value of {name}": value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    values["this machine's Hub token"] = get_token() or ""
    patterns = {what: re.escape(value).encode() for what, value in values.items() if len(value) >= _SHORTEST_SECRET}
    return patterns | {"a path into this home": rb"(?<![\w.-])" + re.escape(f"{Path.home()}/").encode()}
