"""Render HTML pages from their templates: each is one document that reaches no network.

A template's `{{ ... }}` escapes its text and makes hidden characters visible, so no template can forget either. Only
`Markup` is written as it is.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lora_llava.pages.preview_samples import count_of, escape_hidden


def render(template: str, **values: object) -> str:
    """Render a template of `lora_llava/pages/templates`.

    Args:
        template: Its file name.
        values: The names that it uses; their texts may hold anything.

    Returns:
        An HTML document that can be encoded as UTF-8.
    """
    return _ENVIRONMENT.get_template(template).render(values)


def _show_hidden(value: object) -> object:
    """Make the hidden characters of a text visible, line breaks included; Jinja escapes the result."""
    return escape_hidden(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _lines(text: str) -> Markup:
    """Escape a text like `{{ ... }}` does, but keep its line breaks."""
    return Markup("\n").join(escape_hidden(line) for line in text.replace("\r\n", "\n").split("\n"))


def _thousands(number: float) -> str:
    """Write a number with commas between thousands."""
    return f"{number:,}"


def _static(name: str) -> Markup:
    """Return a file of `lora_llava/pages/static` for use in a `style` or `script` element."""
    file = resources.files("lora_llava.pages").joinpath("static", name)
    return Markup(file.read_text(encoding="utf-8"))


def _sha256(text: str) -> str:
    """Return a hash source of the Content-Security-Policy (https://www.w3.org/TR/CSP3/#grammardef-hash-source)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lora_llava.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_show_hidden,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(lines=_lines, thousands=_thousands, count_of=count_of)
    environment.globals.update(static=_static, sha256=_sha256)
    return environment


_ENVIRONMENT = _environment()
