"""Paths in recipes: found where the command runs or beside the recipe, `~` is the home folder, names stay names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.model.start import plan_model
from lora_llava.recipe import RecipeError, dump_recipe, load_generate_recipe, load_recipe, recipe_hash
from lora_llava.recipe.places import find_inputs
from lora_llava.runs.stage1_runs import stage1_of
from lora_llava.splits.encoded_sources import open_sources


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, a folder where the command runs, and one for the recipe."""
    for name in ("home", "here", "beside"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def put(file: Path, text: str = "image,question,answer\n,Is it?,Yes.\n") -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return str(file)


def recipe(places: Path, name: str = "recipe.yaml", **changes: Any) -> Path:
    content: dict[str, Any] = {
        "stage": 2,
        "output_dir": "runs/x",
        "lora": {},
        "model": {"llm": "demo", "vision_tower": "demo", "start_from": {"untrained": True}},
        "data": {"format": "conversations", "path": "data/rows.csv"},
        "training": {"learning_rate": 0.1},
    }
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    file = places / "beside" / name
    file.write_text(json.dumps(content))
    return file


def test_inputs_are_found_here_and_then_beside_the_recipe(places: Path) -> None:
    beside = put(places / "beside" / "data" / "rows.csv")
    assert load_recipe(recipe(places)).data.path == beside
    here = put(places / "here" / "data" / "rows.csv")  # the same rows
    assert load_recipe(recipe(places)).data.path == here
    put(places / "here" / "data" / "rows.csv", "image,question,answer\n")
    with pytest.raises(RecipeError) as raised:
        load_recipe(recipe(places))
    assert str(raised.value) == (
        f"{places}/beside/recipe.yaml: data.path: data/rows.csv exists twice with different contents, as {here} "
        f"in the working directory and as {beside} beside the recipe; write the full path of one"
    )
    assert load_recipe(recipe(places), [f"data.path={beside}"]).data.path == beside


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("data.path", {"data": {"path": "data/rows.csv"}}),
        ("data.image_folder", {"data": {"image_folder": "images"}}),
        ("model.start_from.projector", {"model": {"start_from": {"projector": "mm_projector.bin"}}}),
        ("model.start_from.stage1_run", {"model": {"start_from": {"stage1_run": "runs/align"}}}),
        ("model.llm", {"model": {"llm": "./llm"}}),
        ("model.vision_tower", {"model": {"vision_tower": "a/b/tower"}}),
    ],
)
def test_a_missing_input_is_named_with_both_places(where: str, changes: dict[str, Any], places: Path) -> None:
    if where != "data.path":
        put(places / "beside" / "data" / "rows.csv")
    loaded = load_recipe(recipe(places, **changes))
    value: Any = changes
    while isinstance(value, dict):
        value = next(iter(value.values()))

    def use() -> None:
        open_sources(loaded)
        plan_model(loaded.model)

    with pytest.raises(UserError) as raised:
        use()
    name = Path(value)
    assert where in str(raised.value)
    assert f"(looked for {places / 'here' / name} and {places / 'beside' / name})" in str(raised.value)


def test_a_stage_1_recipe_is_found_alike(places: Path) -> None:
    stage1 = recipe(places, "align.yaml", stage=1, data={"format": "captions", "template": "plain"})
    content = json.loads(stage1.read_text())
    del content["lora"]
    stage1.write_text(json.dumps(content))
    loaded = load_recipe(recipe(places, model={"start_from": {"stage1_recipe": "align.yaml"}}))
    assert loaded.model.start_from.stage1_recipe == str(stage1)
    found = stage1_of(loaded, Path("elsewhere"))
    assert found is not None
    assert found.stage == 1
    stage1.unlink()
    gone = load_recipe(recipe(places, model={"start_from": {"stage1_recipe": "align.yaml"}}))
    assert gone.model.start_from.stage1_recipe == "align.yaml"  # a shipped recipe has that name


def test_home_is_home_in_recipes_and_overrides(places: Path) -> None:
    rows = put(places / "home" / "rows.csv")
    folder = places / "home" / "images"
    file = recipe(places, output_dir="~/out", data={"path": "~/rows.csv", "image_folder": "~/images"})
    loaded = load_recipe(file)
    assert (loaded.output_dir, loaded.data.path, loaded.data.image_folder) == (
        str(places / "home" / "out"),
        rows,
        str(folder),
    )
    sources = ["output_dir=~/other", "data.path=null", "data.sources=[{path: ~/rows.csv}]"]
    changed = load_recipe(recipe(places), sources)
    assert changed.output_dir == str(places / "home" / "other")
    assert changed.data.sources is not None
    assert changed.data.sources[0].path == rows
    assert load_recipe("~/../beside/recipe.yaml") == load_recipe(recipe(places))


def test_outputs_are_not_searched(places: Path) -> None:
    (places / "beside" / "runs" / "x").mkdir(parents=True)
    put(places / "beside" / "data" / "rows.csv")
    assert load_recipe(recipe(places)).output_dir == "runs/x"


def test_names_of_the_hub_and_the_demo_stay_names(places: Path) -> None:
    (places / "here" / "demo").mkdir()
    loaded = load_recipe(recipe(places, model={"llm": "lmsys/vicuna-7b-v1.5"}, data={"path": "org/rows"}))
    names = (loaded.model.llm, loaded.model.vision_tower, loaded.data.path)
    assert names == ("lmsys/vicuna-7b-v1.5", "demo", "org/rows")
    (places / "beside" / "lmsys" / "vicuna-7b-v1.5").mkdir(parents=True)
    found = load_recipe(recipe(places, model={"llm": "lmsys/vicuna-7b-v1.5"}))
    assert found.model.llm == str(places / "beside" / "lmsys" / "vicuna-7b-v1.5")


def test_the_hash_is_of_what_was_written(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(places / "beside" / "data" / "rows.csv")
    file = recipe(places, data={"path": "~/../beside/data/rows.csv"})
    elsewhere = recipe_hash(load_recipe(file))
    relative = recipe_hash(load_recipe(recipe(places)))
    assert elsewhere != relative
    monkeypatch.chdir(places / "home")
    assert recipe_hash(load_recipe(recipe(places))) == relative
    assert "\n  path: " + str(places / "beside" / "data" / "rows.csv") in dump_recipe(load_recipe(file))


def test_recipes_that_generate_are_read_alike(places: Path) -> None:
    captions, prompts = put(places / "beside" / "captions.csv"), places / "home" / "prompts"
    content = {
        "output_dir": "~/rows",
        "contexts": {"captions": "captions.csv"},
        "prompts": "~/prompts",
        "teacher": {"backend": "server", "url": "http://localhost:1/v1", "model": "data/model"},
    }
    (places / "here" / "data" / "model").mkdir(parents=True)
    (places / "beside" / "make.yaml").write_text(json.dumps(content))
    loaded = load_generate_recipe(places / "beside" / "make.yaml")
    assert (loaded.contexts.captions, loaded.prompts) == (captions, str(prompts))
    assert loaded.output_dir == str(places / "home" / "rows")
    assert loaded.teacher.model == "data/model"  # a name on the server
    content["teacher"] = {"backend": "transformers", "model": "data/model"}
    (places / "beside" / "make.yaml").write_text(json.dumps(content))
    local = load_generate_recipe(places / "beside" / "make.yaml")
    assert local.teacher.model == str(places / "here" / "data" / "model")


def test_a_recipe_that_was_made_in_memory_can_be_found_too(places: Path) -> None:
    here = put(places / "here" / "data" / "rows.csv")
    loaded = find_inputs(load_recipe(recipe(places)), None)
    assert find_inputs(loaded, places / "beside").data.path == here


def test_home_is_home_on_the_command_line(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("recipes", ["--copy=~/mine"]) == 0
    assert (places / "home" / "mine" / "my_data_qlora.yaml").is_file()
    for verb, arguments in {
        "evaluate": ["~/run"],
        "chat": ["~/run", "--prompt", "x"],
        "merge": ["~/run", "--output", "y"],
        "push": ["~/run", "me/x", "--dry-run"],
        "check": ["~/run"],
    }.items():
        assert main(verb, arguments) == 2
        assert str(places / "home" / "run") in capsys.readouterr().err
