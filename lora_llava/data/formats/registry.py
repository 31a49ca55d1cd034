"""The table of row formats, from which the reader, the detection and the recipe's choices follow.

A format is a module of this package with a `FORMAT`; nothing else has to name it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_llava.data.formats.shared import Columns, RowError, RowFormat, alternatives

_HELPERS = ("images", "reader", "registry", "shared")
"""The modules of this package that do not define a format."""


def _find_formats() -> tuple[RowFormat, ...]:
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    found = [import_module(f"{__package__}.{name}").FORMAT for name in names if name not in _HELPERS]
    return tuple(sorted(found, key=lambda each: each.precedence))


FORMATS = _find_formats()
"""All row formats by precedence."""
CHAT_COLUMNS = tuple(key for each in FORMATS if each.is_chat for key in each.keys)
"""Columns that hold a list of messages."""
DATA_SETS = {"scienceqa": "the official folder layout, or Hub parquet"}
"""Values of `data.format` for data sets that are not read row by row, each with its description."""
CHOICES = (*dict.fromkeys(choice for each in FORMATS for choice in each.choices), *DATA_SETS)
"""The values of `data.format`."""

if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[CHOICES]


def formats_of(choice: Format) -> tuple[RowFormat, ...]:
    """Return the formats that rows may have under a value of `data.format`."""
    return tuple(each for each in FORMATS if choice in each.choices)


def describe_choices() -> str:
    """Describe the values of `data.format`, for the recipe's schema."""
    found = {choice: alternatives(each.summary for each in formats_of(choice)) for choice in CHOICES[: -len(DATA_SETS)]}
    return " ".join(f"`{choice}`: {summary}." for choice, summary in (found | DATA_SETS).items())


def match_format(row: Mapping[str, Any], choice: Format, columns: Columns) -> tuple[RowFormat, str]:
    """Find a row's format.

    Args:
        row: The row, without its empty values.
        choice: The value of `data.format`.
        columns: The table's columns.

    Returns:
        The format, and the item of `RowFormat.matches` by which the row has it.

    Raises:
        RowError: If the row has none of the formats, or more than one.
    """
    found = [(each, match) for each in formats_of(choice) for match in each.matches(row, columns)]
    chosen = [(each, match) for each, match in found if not each.is_fallback] or found
    if len(chosen) > 1:
        names = " and ".join(match for _, match in chosen)
        raise RowError("both formats", f"the row has {names}, which are two formats; keep one")
    if not chosen:
        has = ", ".join(map(repr, row)) or "nothing"
        wanted = missing_columns(row, choice, columns)
        raise RowError("missing column", f"it lacks {wanted}; it has {has}; columns are named by data.columns")
    return chosen[0]


def missing_columns(row: Mapping[str, Any], choice: Format, columns: Columns) -> str | None:
    """Return the columns that a row or table lacks to have one of the formats, as text; None if it has one."""
    lacking = [each.lacking(row, columns) for each in formats_of(choice)]
    if not all(lacking):
        return None
    for each, names in zip(formats_of(choice), lacking, strict=True):
        if len(names) < len(each.needs(columns)):
            return " and ".join(names)
    return alternatives(" and ".join(names) for names in lacking)
