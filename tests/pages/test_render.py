"""Templates escape every text, show its hidden characters, and fail on a name that they are not given."""

from __future__ import annotations

from importlib import resources

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from lora_llava.pages.render import _ENVIRONMENT, render


def rendered(template: str, **values: object) -> str:
    return _ENVIRONMENT.from_string(template).render(values)


def test_texts_are_escaped_and_their_hidden_characters_shown() -> None:
    hostile = '<b title="\'">\u202e\x1b[2J\n\ud800'
    assert rendered("{{ text }}", text=hostile) == "&lt;b title=&#34;&#39;&#34;&gt;U+202EU+001B[2JU+000AU+D800"
    assert rendered("{{ text }}", text="{{ 7 * 7 }}{% raw %}") == "{{ 7 * 7 }}{% raw %}"
    assert rendered("{{ value }} {{ markup }}", value=1.5, markup=Markup("<b>\n</b>")) == "1.5 <b>\n</b>"


def test_texts_of_several_lines_keep_their_line_breaks_alone() -> None:
    assert rendered("{{ text | lines }}", text="<a>\r\n\tb\u202e\n") == "&lt;a&gt;\nU+0009bU+202E\n"


def test_macros_escape_once() -> None:
    assert rendered("{% macro show(x) %}<i>{{ x }}</i>{% endmacro %}{{ show(text) }}", text="a & b\r") == (
        "<i>a &amp; bU+000D</i>"
    )


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'title' is undefined"):
        render("base.html.j2")


def test_no_template_turns_escaping_off() -> None:
    templates = list(resources.files("lora_llava.pages").joinpath("templates").iterdir())
    names = ("base", "preview", "report", "gallery", "plots", "sweep", "tables", "inspect")
    assert {file.name for file in templates} == {f"{name}.html.j2" for name in names}
    for file in templates:
        text = file.read_text(encoding="utf-8")
        assert "autoescape" not in text
        assert "safe" not in text.replace("unsafe-inline", "")
