"""Writes the cleaned copies of `check --fix` into the recipe, as the only change of its text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from ruamel.yaml import YAML

from lora_llava.core.errors import UserError
from lora_llava.core.storage import FoundPath, atomic_file
from lora_llava.data.files.row_files import data_files
from lora_llava.recipe import Recipe
from lora_llava.recipe.io import RecipeError, parse_yaml, recipes_folder

_SCALAR = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"\\]|\\.)*\"|[^,{}\[\]#\n]*[^,{}\[\]#\s]")
"""A value in YAML: in quotes, or plain up to a comment or the end of a flow mapping."""


def use_fixed(
    recipe: Recipe, file: Path | None, overrides: Sequence[str], copies: Mapping[Path, Path], console: Console
) -> None:
    """Write the paths of cleaned copies into a recipe, or say how to use them where that is not possible.

    Args:
        recipe: The recipe that was checked.
        file: Its file; None if there is none.
        overrides: Overrides of the call; a path that one of them sets is not in the file.
        copies: The copy of each first file of rows.
        console: Prints the line.
    """
    fields = [(field, str(written), copies[found]) for field, written, found in _paths(recipe) if found in copies]
    is_own = file is not None and file.resolve().parent != recipes_folder().resolve()
    for field, written, copy in fields:
        target = _as_written(written, copy)
        is_set_here = not any(field.startswith(override.partition("=")[0]) for override in overrides)
        if is_own and file is not None and is_set_here and _replace(file, field, target):
            console.print(f"--fix: {file}: {field} is now {target}; it was {written}", soft_wrap=True)
        else:
            console.print(f"--fix: to use it, write {field}: {target} into your recipe", soft_wrap=True)


def _paths(recipe: Recipe) -> list[tuple[str, str, Path]]:
    """Return the field, the written value and the first file of each local path of rows."""
    data = recipe.data
    given = [(f"data.sources.{i}.path", source) for i, source in enumerate(data.sources or ())]
    if data.path is not None:
        given = [("data.path", data.train_sources()[0])]
    given += [
        (f"data.{part}_source.path", source)
        for part in ("validation", "test")
        if (source := getattr(data, f"{part}_source")) is not None
    ]
    found = []
    for field, source in given:
        try:
            first = data_files(source.path, split=source.split)[0]
        except UserError:  # a Hub id
            continue
        written = source.path.written if isinstance(source.path, FoundPath) else source.path
        found.append((field, str(written), first))
    return found


def _as_written(written: str, copy: Path) -> str:
    """Return the copy's path in the style of the recipe's: beside the file, or in the folder, that it names."""
    path = Path(written)
    return str(path / copy.name if path.name == copy.parent.name and not path.suffix else path.with_name(copy.name))


def _replace(file: Path, field: str, target: str) -> bool:
    """Replace one value in a recipe's text; False, without a change, if it is not found or the result is not valid."""
    text = file.read_bytes().decode("utf-8")
    *above, key = field.split(".")
    node = _section(YAML().load(text), above)
    if node is None or key not in node:
        return False
    line, column = node.lc.value(key)
    lines = text.splitlines(keepends=True)
    match = _SCALAR.match(lines[line], column)
    if match is None:
        return False
    plain = re.fullmatch(r"[A-Za-z_./~][\w./~ -]*", target)
    quoted = target if plain else "'" + target.replace("'", "''") + "'"
    lines[line] = lines[line][: match.start()] + quoted + lines[line][match.end() :]
    changed = "".join(lines)
    try:
        found = _section(parse_yaml(changed, str(file)), above)
    except RecipeError:
        return False
    if found is None or found.get(key) != target:
        return False
    with atomic_file(file) as temporary:
        temporary.write_bytes(changed.encode("utf-8"))
    return True


def _section(content: Any, path: Sequence[str]) -> Any:
    """Return the mapping at a path of keys and indices; None if there is none."""
    for part in path:
        if part.isdecimal() and isinstance(content, list) and int(part) < len(content):
            content = content[int(part)]
        else:
            content = content.get(part) if isinstance(content, Mapping) else None
    return content if isinstance(content, Mapping) else None
