"""The reference of recipe keys as Markdown (`docs/recipes.md`), generated from the JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lora_llava.recipe.io import json_schema, shipped_generate_recipes, shipped_recipes

_INTRODUCTION = """\
# Recipes

A recipe is a YAML file that describes one run. `lora-llava recipes` lists the shipped ones, `lora-llava recipes --copy
my_recipes` copies them. Any value can be replaced on the command line, in YAML's own syntax:

    lora-llava plan scienceqa_qlora.yaml lora.r=32 training.learning_rate=1e-4

Unknown keys, wrong types and duplicate keys are refused. Editors that know YAML language servers complete and check
recipes by `recipes/schema.json`. `~` is the home folder. Relative input paths are looked up where the command runs,
then beside the recipe; output paths are relative to where the command runs.

This page is generated: `lora-llava recipes --reference > docs/recipes.md`.
"""


def key_reference() -> str:
    """Write the reference of all shipped recipes and all recipe keys.

    Returns:
        A Markdown page: one table of recipes, then one table of keys per section.
    """
    schema = json.loads(json_schema())
    parts = [_INTRODUCTION, "## Shipped recipes\n", *_recipe_table(), ""]
    parts += ["## Top level\n", *_key_table(schema, schema["$defs"]), ""]
    sections = {
        section["title"]: (name, section) for name, section in reversed(list(_sections(schema, schema["$defs"])))
    }
    for name, section in reversed(sections.values()):
        parts += [f"## `{name}`\n", section["description"] + "\n", *_key_table(section, schema["$defs"]), ""]
    return "\n".join(parts).rstrip() + "\n"


def _recipe_table() -> Iterator[str]:
    yield "| recipe | what it does |"
    yield "|---|---|"
    for path in (*shipped_recipes(), *shipped_generate_recipes()):
        yield f"| `{path.name}` | {_first_comment(path)} |"


def _first_comment(path: Path) -> str:
    """Return the comment at the head of a recipe, without the line for editors."""
    content = YAML().load(path.read_text(encoding="utf-8"))
    lines = [token.value for token in content.ca.comment[1]] if content.ca.comment else []
    text = " ".join(line.strip().lstrip("# ") for line in "".join(lines).splitlines())
    text = text.partition("yaml-language-server: ")[2].partition(" ")[2].strip() or text
    return text.partition(". `lora-llava ")[0].rstrip(".") + "."


def _sections(section: dict[str, Any], defs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """List the sections in a section, each followed by its own sections."""
    for key, value in section["properties"].items():
        for branch in (value, *value.get("anyOf", ())):
            name = branch.get("$ref") or branch.get("items", {}).get("$ref")
            if name:
                inner = defs[name.rpartition("/")[2]]
                yield f"{prefix}{key}", inner
                yield from _sections(inner, defs, f"{prefix}{key}.")


def _key_table(section: dict[str, Any], defs: dict[str, Any]) -> Iterator[str]:
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    required = section.get("required", ())
    for key, value in section["properties"].items():
        default = "required" if key in required else _default(value)
        meaning = " ".join(value.get("description", "").split()).replace("|", "\\|")
        yield f"| `{key}` | {_type(value, defs)} | {default} | {meaning} |"


def _default(value: dict[str, Any]) -> str:
    if "default" not in value:
        return "its keys' defaults" if "$ref" in value else ""
    default = value["default"]
    return "all" if isinstance(default, list) else f"`{json.dumps(default)}`"


def _type(value: dict[str, Any], defs: dict[str, Any]) -> str:
    """Describe the values of a key: choices, a type with its bounds, or a section."""
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_type(branch, defs) for branch in value["anyOf"]))
    if "$ref" in value:
        target = defs[value["$ref"].rpartition("/")[2]]
        return "a section" if "properties" in target else _type(target, defs)
    if "enum" in value or "const" in value:
        return ", ".join(f"`{json.dumps(one).strip(chr(34))}`" for one in value.get("enum", [value.get("const")]))
    if value.get("type") == "array":
        return f"a list of {_type(value.get('items', {}), defs)}"
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = ", ".join(f"{words} {value[name]}" for name, words in bounds.items() if name in value)
    kind = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false"}.get(
        value.get("type", ""), value.get("type", "any")
    )
    return f"{kind} ({limits})" if limits else kind
