"""Recipe files: finding, the shipped ones, their schema, and files that are no recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_llava.recipe import RecipeError, copy_recipes, find_recipe, json_schema, load_recipe, shipped_recipes
from lora_llava.recipe.io import recipes_folder

SCHEMA = recipes_folder() / "schema.json"
needs_schema = pytest.mark.skipif(not SCHEMA.is_file(), reason="recipes/schema.json is not there yet")
SHIPPED = shipped_recipes()


def test_recipes_are_shipped() -> None:
    assert {"demo_align.yaml", "demo_scienceqa_qlora.yaml"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=[path.name for path in SHIPPED])
def test_a_shipped_recipe_loads_and_names_its_schema(path: Path) -> None:
    load_recipe(path)
    assert path.read_text(encoding="utf-8").splitlines()[0] == "# yaml-language-server: $schema=schema.json"


def test_a_stage_1_recipe_that_is_named_is_shipped() -> None:
    names = {load_recipe(path).model.start_from.stage1_recipe for path in SHIPPED} - {None}
    assert {load_recipe(recipes_folder() / str(name)).stage for name in names} == {1}


@needs_schema
def test_the_schema_file_is_the_schema() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json.loads(json_schema())  # pydantic writes 0 or 0.0


def test_the_schema_is_strict_and_describes_every_key() -> None:
    schema = json.loads(json_schema())
    sections: list[dict[str, Any]] = [schema, *schema["$defs"].values()]
    assert len(sections) == 13
    for section in sections:
        assert section["additionalProperties"] is False
        assert section["description"]
        for name, key in section["properties"].items():
            assert key.get("description"), f"{section['title']}.{name}"
    assert schema["required"] == ["stage", "output_dir", "model", "data", "training"]


@needs_schema
def test_a_copy_leaves_what_is_there_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "recipes"
    names = {path.name for path in recipes_folder().iterdir()}
    assert {path.name for path in copy_recipes(folder)} == names
    assert all((folder / name).read_bytes() == (recipes_folder() / name).read_bytes() for name in names)
    (folder / "demo_align.yaml").write_text("mine")
    (folder / "schema.json").unlink()
    assert copy_recipes(folder) == [folder / "schema.json"]
    assert (folder / "demo_align.yaml").read_text() == "mine"


def test_a_recipe_is_found_by_path_first_and_by_name_among_the_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = recipes_folder() / "demo_align.yaml"
    assert find_recipe("demo_align.yaml") == shipped
    assert find_recipe("recipes/demo_align.yaml") == shipped
    (tmp_path / "demo_align.yaml").write_text("mine")
    assert find_recipe("demo_align.yaml") == Path("demo_align.yaml")


def test_a_recipe_that_is_not_there_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo_aling.yaml")
    assert str(caught.value) == 'demo_aling.yaml: no such recipe (did you mean "demo_align.yaml"?)'
    elsewhere = tmp_path / "demo_align.yaml"
    with pytest.raises(RecipeError) as caught:
        load_recipe(elsewhere)
    assert str(caught.value) == f'{elsewhere}: no such recipe (did you mean "demo_align.yaml"?)'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": a recipe is a mapping of keys, not a NoneType; start from a shipped recipe"),
        ("- a\n", ": a recipe is a mapping of keys, not a list; start from a shipped recipe"),
        ("stage\n", ": a recipe is a mapping of keys, not a str; start from a shipped recipe"),
        (
            "a: !!python/object:os.system x\n",
            ", line 1: not YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object:os.system'",
        ),
        ("a: 1\n b: 2\n", ", line 2: not YAML: mapping values are not allowed here"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert str(caught.value) == f"{file}{message}"


@pytest.mark.parametrize("content", [b"stage: \xe9\n", b"stage: \x00\n", b"\xff\xfe"])
def test_a_file_that_is_not_text_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError):
        load_recipe(file)
