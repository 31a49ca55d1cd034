"""Reading and writing recipes as text, with their comments."""

from __future__ import annotations

import io
from typing import Any

from ruamel.yaml import YAML


def load_text(text: str) -> Any:
    """Return a recipe's content with its comments."""
    return _yaml().load(text)


def dump_text(content: Any) -> str:
    """Return the text of a recipe's content, in the layout of the shipped recipes."""
    stream = io.StringIO()
    _yaml().dump(content, stream)
    return "\n".join(map(_comment_apart, stream.getvalue().splitlines())) + "\n"


def _yaml() -> YAML:
    yaml = YAML()
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _comment_apart(line: str) -> str:
    """Put two spaces before a line's comment, which ruamel leaves in the column of the previous value."""
    value, sign, comment = line.rpartition("# ")
    return f"{value.rstrip()}  # {comment}" if sign and value.strip() else line
