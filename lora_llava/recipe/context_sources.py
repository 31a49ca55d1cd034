"""Overrides that name another source of contexts replace the recipe's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

_SOURCES = ("captions", "instances", "boxes", "contexts")
_COMPLEMENTS = ({"captions", "instances"}, {"captions", "boxes"})
"""Sources that are used together: captions and either kind of boxes."""
_ABOUT = ("images", "columns", "box_format", "box_unit")
"""Keys that describe the former sources."""
_NULLS = ("", "~", "null", "Null", "NULL")


def replace_sources(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Remove a recipe's sources of contexts where overrides name another one, and report it in a line on stderr.

    A key that the recipe sets is changed in place, with nothing removed, and boxes are added to captions.

    Args:
        content: The recipe's content before the overrides are applied; changed.
        overrides: Texts `key.sub=value`.
    """
    section = content.get("contexts")
    if not isinstance(section, dict):
        return
    given = [text.removeprefix("contexts.").partition("=") for text in overrides if text.startswith("contexts.")]
    pairs = [(key, value) for key, _, value in given]
    named = {key for key, _ in pairs}
    former = {key for key in _SOURCES if section.get(key)}
    new = [key for key, value in pairs if key in _SOURCES and value.strip() not in _NULLS and key not in former]
    if not new or not former or any(former.union(new) <= each for each in _COMPLEMENTS):
        return
    removed = [key for key in (*_SOURCES, *_ABOUT) if section.get(key) and key not in named]
    for key in removed:
        section.pop(key)
    if removed:
        listed = ", ".join(f"contexts.{key}" for key in removed)
        print(
            f"note: contexts.{new[0]} replaces the recipe's {listed}; to keep one, give it on the command line too",
            file=sys.stderr,
        )
