"""Writes the cleaned copies of `check --fix` into the recipe, as the only change of its text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class NamedRows:
    """A path of rows in a recipe.

    Attributes:
        field: The recipe field.
        written: The path as it is written.
        path: The path that was found: a file, or a folder with one.
        first: Its first file of rows.
    """

    field: str
    written: str
    path: Path
    first: Path


def named_rows(recipe: Recipe) -> list[NamedRows]:
    """Return the local paths of rows that a recipe names."""
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
        found.append(NamedRows(field, str(written), Path(source.path), first))
    return found


def use_fixed(
    named: Sequence[NamedRows],
    file: Path,
    overrides: Sequence[str],
    copies: Mapping[Path, Path],
    console: Console,
) -> None:
    """Write the paths of cleaned copies into a recipe, or say how to use them where that is not possible.

    Args:
        named: The paths of the recipe that was checked, from before the copies were written.
        file: Its file.
        overrides: Overrides of the call; a path that one of them sets is not in the file.
        copies: The copy of each first file of rows.
        console: Prints the line.
    """
    is_own = file.resolve().parent != recipes_folder().resolve()
    for each in named:
        if each.first not in copies:
            continue
        target = _as_written(each, copies[each.first])
        is_set_here = not any(each.field.startswith(override.partition("=")[0]) for override in overrides)
        if is_own and is_set_here and _replace(file, each.field, target):
            console.print(f"--fix: {file}: {each.field} is now {target}; it was {each.written}", soft_wrap=True)
        else:
            console.print(f"--fix: to use it, write {each.field}: {target} into your recipe", soft_wrap=True)


def _as_written(named: NamedRows, copy: Path) -> str:
    """Return the copy's path in the style of the recipe's: beside the file, or in the folder, that it names."""
    written = Path(named.written)
    if named.path.is_dir():
        return str(written / copy.relative_to(named.path))
    return str(written.with_name(copy.name))


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
