"""What `init` wrote into a recipe, and the refreshing of its data part without a person's own changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from ruamel.yaml.comments import CommentedMap

from lora_llava.core.errors import UserError
from lora_llava.core.storage import atomic_file
from lora_llava.data.files.cleaned_copy import fixed_name
from lora_llava.prepare.recipe_text import dump_text, load_text
from lora_llava.recipe.io import parse_yaml
from lora_llava.runs.directory import write_json

RECORD_NAME = ".recipe-init.json"
"""File beside the recipe with what `init` wrote and was asked for; `init --update` needs it."""
DATA_KEYS = (
    *("format", "path", "columns", "image_folder", "follow_links"),
    *("validation_rows", "validation_source", "test_source"),
)
"""The keys of a recipe's data section that describe the folder."""
_GUESSED = ("validation_rows",)
"""Keys that may be a person's own choice where nothing is recorded."""


def data_part(text: str, where: str) -> dict[str, Any]:
    """Return the values of `DATA_KEYS` in a recipe's text."""
    content = parse_yaml(text, where)
    data = content.get("data") if isinstance(content, Mapping) else None
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: it has no data section; remove it, and run init again")
    return {key: data[key] for key in DATA_KEYS if key in data}


def write_record(recipe: Path, data: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Keep what was written into a recipe's data section, and the options it followed from."""
    target = recipe.with_name(RECORD_NAME)
    with atomic_file(target) as temporary:
        write_json(temporary, {"data": dict(data), "options": dict(options)})


def read_record(recipe: Path) -> dict[str, dict[str, Any]]:
    """Return the record beside a recipe: `data` and `options`, empty where none was kept or it is damaged."""
    try:
        content = json.loads(recipe.with_name(RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    parts = content if isinstance(content, dict) else {}
    return {key: parts[key] if isinstance(parts.get(key), dict) else {} for key in ("data", "options")}


def update_recipe(recipe: Path, fresh: Mapping[str, Any], console: Console) -> str:
    """Return a recipe's text with its data part refreshed; a value that a person changed is kept.

    Args:
        recipe: The recipe's file.
        fresh: The values of `DATA_KEYS` that a new recipe would have.
        console: Prints what changed and what was kept.

    Returns:
        The text, with all comments.
    """
    text = recipe.read_text(encoding="utf-8")
    now, before = data_part(text, str(recipe)), read_record(recipe)["data"]
    content = load_text(text)
    changes = []
    for key in DATA_KEYS:
        is_own = _is_own(key, now.get(key), before)
        if now.get(key) == fresh.get(key):
            continue
        if is_own:
            console.print(f"kept data.{key}: {_shown(now.get(key))}, which you changed", soft_wrap=True)
            continue
        _set(content["data"], key, fresh.get(key))
        changes.append(f"data.{key}: {_shown(fresh.get(key))}; it was {_shown(now.get(key))}")
    for change in changes:
        console.print(change, soft_wrap=True)
    if not changes:
        console.print(f"{recipe}: no key had to change", soft_wrap=True)
    return dump_text(content) if changes else text


def _is_own(key: str, now: Any, before: Mapping[str, Any]) -> bool:
    """Check whether a person chose a value: it is not what `init` or `check --fix` wrote."""
    if not before:
        return key in _GUESSED and now is not None
    written = before.get(key)
    if now == written:
        return False
    return not (key == "path" and isinstance(now, str) and isinstance(written, str) and _is_copy(now, written))


def _is_copy(name: str, original: str) -> bool:
    return Path(name) in (fixed_name(Path(original)), Path(original.replace(".fixed", "", 1)))


def _set(data: CommentedMap, key: str, value: Any) -> None:
    if value is None:
        data.pop(key, None)
        return
    if isinstance(value, Mapping):
        value = CommentedMap(value)
        value.fa.set_flow_style()
    if key in data:
        data[key] = value
    else:
        data.insert(1, key, value)


def _shown(value: Any) -> str:
    return (
        "not set" if value is None else json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
    )
