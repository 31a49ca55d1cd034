"""Reading JSON files that other people and libraries wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, such as a model's config.json.

    Raises:
        UserError: If the file is damaged, or contains something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{file}: not JSON: {reason}; download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: it should contain an object, not {type(content).__name__}; download it again")
    return content


def read_object_if_any(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if the file does not exist.

    Raises:
        UserError: As from `read_object`.
    """
    return read_object(file) if file.is_file() else {}
