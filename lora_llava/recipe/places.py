"""Resolution of the paths in recipes; the schema marks the fields that are paths."""

from __future__ import annotations

import filecmp
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel

from lora_llava.core.errors import UserError
from lora_llava.core.storage import FoundPath

Schema = TypeVar("Schema", bound=BaseModel)
DEMO_DATA = ("demo", "demo_small")
"""Names of the demo's data, in place of a path."""


@dataclass(frozen=True)
class Place:
    """Marks a text field of a recipe as a path.

    Attributes:
        kind: `input` is read; `named` may also be a Hub id or `demo`; `output` is written, and not searched for.
        backend: The field is a path only if the section's `backend` has this value.
    """

    kind: Literal["input", "named", "output"]
    backend: str | None = None


def _place_of(annotation: Any, metadata: Any = ()) -> Place | None:
    """Return the `Place` of a field's type, itself or inside a union."""
    found = next((each for each in metadata if isinstance(each, Place)), None)
    inner = (_place_of(each, getattr(each, "__metadata__", ())) for each in get_args(annotation))
    return found or next((each for each in inner if each), None)


def find_inputs(recipe: Schema, beside: Path | None) -> Schema:
    """Turn the paths that a recipe reads into absolute ones, and `~` into the home folder.

    A relative path is looked up in the working directory, then beside the recipe. A path that exists in neither is
    left unchanged: it may be a Hub id. The code that reads it reports that it is missing, with `looked_in`.

    Args:
        recipe: A recipe or a section of one.
        beside: The recipe's folder.

    Returns:
        The recipe with its paths resolved. Each keeps the path as written, so that `recipe_hash` does not depend on
        the machine.

    Raises:
        UserError: If different files or folders of this name exist in both places.
    """
    return _found_in(recipe, beside, "")


def _found_in(section: Schema, beside: Path | None, where: str) -> Schema:
    changed: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value, place = getattr(section, name), _place_of(field.annotation, field.metadata)
        if isinstance(value, BaseModel):
            changed[name] = _found_in(value, beside, f"{where}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            changed[name] = tuple(_found_in(each, beside, f"{where}{name}.{i}.") for i, each in enumerate(value))
        elif isinstance(value, str) and place is not None and _applies(place, section):
            changed[name] = _find(value, place, beside, f"{where}{name}")
    return section.model_copy(update=changed)


def _applies(place: Place, section: BaseModel) -> bool:
    return place.backend is None or place.backend == getattr(section, "backend", None)


def _find(value: str, place: Place, beside: Path | None, field: str) -> str:
    if isinstance(value, FoundPath) or not value or (place.kind == "named" and value in (*DEMO_DATA, "smollm2")):
        return value
    expanded = os.path.expanduser(value)
    if place.kind == "output" or os.path.isabs(expanded):
        return FoundPath(expanded, value)
    here = Path(os.path.abspath(expanded))
    there = Path(os.path.abspath(beside / expanded)) if beside is not None else here
    if here.exists() and there.exists() and not _are_same(here, there):
        raise UserError(
            f"{field}: {value} exists twice with different contents, as {here} in the working directory and as {there} "
            "beside the recipe; write the full path of one"
        )
    found = next((each for each in (here, there) if each.exists()), None)
    if found is not None:
        return FoundPath(str(found), value)
    return FoundPath(value, value, tuple(dict.fromkeys((str(here), str(there)))))


def _are_same(one: Path, other: Path) -> bool:
    if one.samefile(other):
        return True
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def as_written(recipe: BaseModel, content: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's plain content with its paths as they were written.

    Args:
        recipe: The recipe.
        content: The recipe's `model_dump`, or a part of it.
    """
    return {name: _written(getattr(recipe, name), value) for name, value in content.items()}


def _written(value: Any, dumped: Any) -> Any:
    if isinstance(value, FoundPath):
        return value.written
    if isinstance(value, BaseModel):
        return as_written(value, dumped)
    if isinstance(value, tuple):
        return [_written(each, plain) for each, plain in zip(value, dumped, strict=True)]
    return str(value) if isinstance(value, str) else dumped
