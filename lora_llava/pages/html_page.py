"""The frame of the pages that the package writes to files: one HTML document that reaches no network."""

from __future__ import annotations

from html import escape

from lora_llava.pages.preview_samples import escape_hidden

NO_SCRIPTS = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""A Content-Security-Policy of images in the page and inline styles alone."""


def write_page(title: str, style: str, body: str, policy: str = NO_SCRIPTS, script: str = "") -> str:
    """Write a document.

    Args:
        title: Any text.
        style: CSS.
        body: HTML, escaped where it has to be.
        policy: Its Content-Security-Policy.
        script: JavaScript, which the policy has to allow.
    """
    scripts = f"\n<script>{script}</script>" if script else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape_line(title)}</title>
<style>{style}</style>{scripts}
</head>
<body>
{body}
</body>
</html>
"""


def escape_line(text: str) -> str:
    """A text without markup, its hidden characters shown."""
    return escape(escape_hidden(text))


def escape_lines(text: str) -> str:
    """The same with its line breaks kept."""
    return "\n".join(map(escape_line, text.replace("\r\n", "\n").split("\n")))
