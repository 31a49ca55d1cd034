"""Detection of secrets, which must not be in a recipe: every run saves a copy of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

TOKENS = {
    "a Hugging Face token": rb"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}",
    "an OpenAI key": rb"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "an AWS key": rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google key": rb"\bAIza[A-Za-z0-9_-]{35}",
    "a Slack token": rb"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a JSON web token": rb"eyJ[A-Za-z0-9_-]{20,}\.[A-Za-z0-9_-]{20,}\.",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in a URL": rb"\b[a-z][a-z0-9+.-]*://[^/\s:@\"']+:[^/\s@\"']+@",
}
"""Patterns of secrets, by their kind."""
_OPENAI = rb"(?<![A-Za-z0-9])sk-(?:[a-z0-9]+-)?(?=\w*\d)\w{20,}"
"""An OpenAI key in a recipe, whose folders may be called sk-learn-experiments-2."""


def find_secrets(content: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Find secrets in a recipe.

    Args:
        content: The recipe's plain content, or a part of it.
        field: The field that holds this part.

    Yields:
        The field and the kind of secret in it, never the secret.
    """
    if isinstance(content, dict):
        for key, value in content.items():
            yield from find_secrets(value, f"{field}.{key}" if field else str(key))
    elif isinstance(content, list):
        for place, value in enumerate(content):
            yield from find_secrets(value, f"{field}.{place}")
    elif isinstance(content, str):
        text = content.encode("utf-8", "surrogatepass")
        for what, pattern in (TOKENS | {"an OpenAI key": _OPENAI}).items():
            if re.search(pattern, text):
                yield field, what
