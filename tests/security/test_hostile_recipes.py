"""Hostile recipes: nothing is built that a tag names, nothing unfolds, and each is one line and exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.security.hostile import MEMORY_RISE_MIB, run_verb, write_recipe

EXPANDS = "its aliases expand to more than 1,000,000 characters; write the values out"
TOO_DEEP = "not readable as YAML: it is nested too deeply"


def laughs(levels: int, item: str = "{}") -> str:
    """Each level holds the one before ten times."""
    lines = ["k0: &k0 [x, x, x, x, x, x, x, x, x, x]" if item == "{}" else "k0: &k0 {x: 1}"]
    for level in range(1, levels):
        inner = f"[{', '.join([f'*k{level - 1}'] * 10)}]"
        lines.append(f"k{level}: &k{level} {item.format(inner)}")
    return "\n".join(lines) + "\n"


HOSTILE = {
    "apply": (
        "stage: !!python/object/apply:os.system ['touch {marker}']\n",
        ", line 1: not YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.system'",
    ),
    "new": (
        "a: 1\nstage: !!python/object/new:subprocess.Popen [[touch, '{marker}']]\n",
        ", line 2: not YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/new:subprocess.Popen'",
    ),
    "name": (
        "stage: !!python/name:os.system\n",
        ", line 1: not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'",
    ),
    "laughs": (laughs(10), f": {EXPANDS}"),
    "merged laughs": (laughs(9, "{{<<: {}}}"), f": {EXPANDS}"),
    "alias of itself": ("lora: &a [*a]\n", f": {EXPANDS}"),
    "long alias": ("a: &a " + "x" * 100_000 + "\nb: [" + "*a, " * 20 + "]\n", f": {EXPANDS}"),
    "deep lists": ("lora: " + "[" * 3000 + "]" * 3000, f": {TOO_DEEP}"),
    "deep mappings": ("lora: " + "{a: " * 3000 + "}" * 3000, f": {TOO_DEEP}"),
    "number": (
        "stage: " + "9" * 5000,
        ": not YAML: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits",
    ),
    "date": ("stage: 2001-99-99\n", ": not YAML: month must be in 1..12"),
    "int": ("stage: !!int abc\n", ": not YAML: invalid literal for int() with base 10: 'abc'"),
    "twice": ("stage: 1\nstage: 2\n", ", line 2: the key stage appears twice; keep one"),
    "two documents": ("stage: 1\n---\nstage: 2\n", ", line 2: not YAML: but found another document"),
    "nul": ("stage: \0\n", ": not YAML: unacceptable character #x0000: special characters are not allowed"),
}


@pytest.mark.parametrize("verb", [["finetune", "--dry-run"], ["check"]], ids=["finetune", "check"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_one_line(name: str, verb: list[str], tmp_path: Path) -> None:
    text, reported = HOSTILE[name]
    recipe, marker = tmp_path / "recipe.yaml", tmp_path / "executed"
    recipe.write_text(text.replace("{marker}", str(marker)))
    found = run_verb(verb[0], recipe, *verb[1:])
    assert (found.code, found.out, found.err) == (2, "", f"error: {recipe}{reported}\n")
    assert not marker.exists()
    assert found.rise_mib < MEMORY_RISE_MIB


def test_a_recipe_of_50_mb_is_not_read(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stage: " + "a" * 50_000_000)
    found = run_verb("check", recipe)
    reported = "the file has 50,000,007 bytes, and a recipe at most 1,000,000; name a recipe"
    assert (found.code, found.err) == (2, f"error: {recipe}: {reported}\n")
    assert found.rise_mib < 20


def test_a_long_value_is_shortened(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", stage2_content | {"stage": "a" * 900_000})
    found = run_verb("check", recipe)
    assert (found.code, found.err) == (2, f"error: {recipe}: stage is '{'a' * 199}...; it should be 1 or 2\n")


def test_an_override_is_read_by_the_same_rules(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    recipe, marker = write_recipe(tmp_path / "recipe.yaml", stage2_content), tmp_path / "executed"
    override = f"lora.r=!!python/object/apply:os.system ['touch {marker}']"
    found = run_verb("check", recipe, override)
    reported = "could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'"
    assert (found.code, found.err) == (2, f"error: override {override!r}, line 1: not YAML: {reported}\n")
    assert not marker.exists()


@pytest.mark.parametrize("text", ["a: &a {r: 8}\nb: *a\n", "a: &a {r: 8}\nb: {<<: *a, s: 1}\n"])
def test_a_few_aliases_are_taken(text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert run_verb("check", recipe).err.splitlines()[-2:] == [
        f"error: {recipe}: a is not a key of a recipe",
        f"error: {recipe}: b is not a key of a recipe",
    ]


def test_a_generate_recipe_has_the_same_limits(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(laughs(10))
    found = run_verb("generate-data", recipe, "--dry-run")
    assert (found.code, found.err) == (2, f"error: {recipe}: {EXPANDS}\n")
