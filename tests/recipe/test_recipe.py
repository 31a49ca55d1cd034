"""Recipes: strict reading, overrides by the same rules, and writing back."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_llava.core.errors import UserError
from lora_llava.recipe import RecipeError, dump_recipe, load_recipe, recipe_hash
from lora_llava.recipe.io import check_recipe, parse_yaml

MINIMAL = """\
stage: 2
output_dir: runs/mine
model:
  llm: vicuna
  vision_tower: clip
  start_from: {untrained: true}
lora: {}
data: {format: scienceqa, path: data}
training: {learning_rate: 2e-5}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return path


def fails(file: Path, overrides: Sequence[str], *lines: str) -> None:
    """Loading tells exactly these mistakes, after the file's name or as an override's."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    assert str(caught.value) == "\n".join(line if line.startswith("override") else f"{file}: {line}" for line in lines)
    assert isinstance(caught.value, UserError)
    assert caught.value.exit_code == 2


def test_a_minimal_recipe_takes_the_defaults(file: Path) -> None:
    recipe = load_recipe(file)
    assert (recipe.stage, recipe.output_dir, recipe.seed, recipe.evaluation) == (2, "runs/mine", 0, None)
    assert (recipe.model.llm, recipe.model.vision_tower, recipe.model.quantization) == ("vicuna", "clip", "nf4")
    assert recipe.model.start_from.untrained is True
    assert recipe.lora is not None
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.targets) == (64, 16, "all-linear")
    assert (recipe.data.template, recipe.data.max_length, recipe.data.on_overlong) == ("auto", 2048, "error")
    assert recipe.data.splits.model_dump() == {"train": "train", "validation": "val", "test": "test"}
    assert (recipe.training.learning_rate, recipe.training.epochs) == (2e-5, 1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("outptu_dir=x", 'outptu_dir is not a key of a recipe (did you mean "output_dir"?)'),
        ("lora.alhpa=1", 'lora.alhpa is not a key of a recipe (did you mean "alpha"?)'),
        ("data.splits.tain=x", 'data.splits.tain is not a key of a recipe (did you mean "train"?)'),
        ("model.start_from.lava=x", 'model.start_from.lava is not a key of a recipe (did you mean "llava"?)'),
        ("training.batch_sise=1", 'training.batch_sise is not a key of a recipe (did you mean "batch_size"?)'),
        ("evaluation.befor=1", 'evaluation.befor is not a key of a recipe (did you mean "before"?)'),
        ("model.llmm.x=1", 'model.llmm is not a key of a recipe (did you mean "llm"?)'),
        ("lora={alhpa: 1}", 'lora.alhpa is not a key of a recipe (did you mean "alpha"?)'),
        ("zzz=1", "zzz is not a key of a recipe"),
    ],
)
def test_an_unknown_key_names_the_nearest(file: Path, override: str, message: str) -> None:
    fails(file, [override], message)


@pytest.mark.parametrize(("addition", "place"), [('lora: {}\n"": 1\n', "recipe"), ('lora: {"": 1}\n', "lora")])
def test_an_empty_key_is_reported(file: Path, addition: str, place: str) -> None:
    file.write_text(MINIMAL.replace("lora: {}\n", "") + addition)
    fails(file, [], f"{place}: a key in it is empty; name it or remove it")


def test_an_unknown_key_of_the_file_and_a_missing_one_are_both_reported(file: Path) -> None:
    file.write_text(MINIMAL.replace("output_dir", "output_dri"))
    message = 'output_dri is not a key of a recipe (did you mean "output_dir"?)'
    fails(file, [], "output_dir is missing", message)


@pytest.mark.parametrize(
    ("addition", "key", "line"),
    [("seed: 1\nseed: 2\n", "seed", 11), ("stage: 1\n", "stage", 10), ("a:\n  b: 1\n  b: 1\n", "b", 12)],
)
def test_a_key_given_twice_is_refused(file: Path, addition: str, key: str, line: int) -> None:
    file.write_text(MINIMAL + addition)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert str(caught.value) == f"{file}, line {line}: the key {key} appears twice; keep one"


def test_a_key_given_twice_in_an_override_is_refused(file: Path) -> None:
    fails(file, ["lora={r: 1, r: 2}"], "override 'lora={r: 1, r: 2}', line 1: the key r appears twice; keep one")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("3", 3),
        ("-0.1", -0.1),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("12:30", "12:30"),
        ("'3'", "3"),
        ("010", 10),
        ("0o10", 8),
        ("{x: 1}", {"x": 1}),
        ("[a, no]", ["a", "no"]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)


def test_no_is_a_name_and_a_short_float_a_number(file: Path) -> None:
    recipe = load_recipe(file, ["output_dir=no", "training.learning_rate=5e-4"])
    assert (recipe.output_dir, recipe.training.learning_rate) == ("no", 5e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage=3", "stage is 3; it should be 1 or 2"),
        ("stage='2'", "stage is '2'; it should be 1 or 2 (did you mean 2?)"),
        ("output_dir=5", 'output_dir is 5; it should be a valid string (did you mean "5"?)'),
        ("lora.r=8.0", "lora.r is 8.0; it should be a valid integer (did you mean 8?)"),
        ("lora.r=true", "lora.r is True; it should be a valid integer"),
        ("lora.r=0", "lora.r is 0; it should be greater than or equal to 1"),
        ("lora.r=", "lora.r is None; it should be a valid integer"),
        ("lora.dropout=1", "lora.dropout is 1; it should be less than 1"),
        ("lora.rslora=no", "lora.rslora is 'no'; it should be a valid boolean (did you mean false?)"),
        (
            "training.learning_rate='2e-5'",
            "training.learning_rate is '2e-5'; it should be a valid number (did you mean 2e-05?)",
        ),
        ("training.learning_rate=.nan", "training.learning_rate is nan; it should be a finite number"),
        (
            "training.lr_scheduler=poly",
            "training.lr_scheduler is 'poly'; it should be 'cosine', 'linear' or 'constant_with_warmup'",
        ),
        (
            "model.start_from.untrained=false",
            "model.start_from.untrained is False; it should be True (did you mean null?)",
        ),
    ],
)
def test_a_wrong_value_is_reported_with_its_field(file: Path, override: str, message: str) -> None:
    fails(file, [override], message)


def test_every_error_is_reported(file: Path) -> None:
    fails(
        file,
        ["lora.r=x", "seed=y", "datta=z"],
        "seed is 'y'; it should be a valid integer",
        "lora.r is 'x'; it should be a valid integer",
        'datta is not a key of a recipe (did you mean "data"?)',
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.r", "override 'lora.r': write key.sub=value"),
        ("=3", "override '=3': write key.sub=value"),
        ("lora.=3", "override 'lora.=3': write key.sub=value"),
        ("stage.x=1", "override 'stage.x=1': stage is not a section"),
    ],
)
def test_a_malformed_override_is_refused(file: Path, override: str, message: str) -> None:
    fails(file, [override], message)


def test_an_override_that_is_not_yaml_is_refused(file: Path) -> None:
    with pytest.raises(RecipeError, match=r"^override 'seed=\[1', line 1: not YAML: "):
        load_recipe(file, ["seed=[1"])


def test_overrides_make_sections_and_the_last_one_wins(file: Path) -> None:
    recipe = load_recipe(file, ["evaluation.before=3", "seed=1", "data.splits={train: a=b}", "seed=2"])
    assert recipe.evaluation is not None
    assert (recipe.evaluation.before, recipe.evaluation.after, recipe.seed) == (3, "all", 2)
    assert (recipe.data.splits.train, recipe.data.splits.test) == ("a=b", "test")


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=60).filter(
    lambda text: not text.startswith("~")
)


@settings(max_examples=50, deadline=None)
@given(rank=st.integers(1, 999), rate=st.floats(1e-12, 1), folder=WORDS)
def test_an_override_is_the_same_as_the_file(
    tmp_path_factory: pytest.TempPathFactory, rank: int, rate: float, folder: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "minimal.yaml"
    file.write_text(MINIMAL)
    content = parse_yaml(MINIMAL, "here")
    content["lora"]["r"], content["training"]["learning_rate"], content["output_dir"] = rank, rate, folder
    quoted = json.dumps(folder, ensure_ascii=False)
    overrides = [f"lora.r={rank}", f"training.learning_rate={rate!r}", f"output_dir={quoted}"]
    assert load_recipe(file, overrides) == check_recipe(content, "here")


STARTS = {"stage1_run": "a", "stage1_recipe": "b.yaml", "projector": "c.bin", "llava": "d", "untrained": True}
START_NAMES = "run, stage1_run, stage1_recipe, projector, llava, untrained"


@pytest.mark.parametrize("name", STARTS)
def test_one_start_is_taken(file: Path, name: str) -> None:
    drop = ["model.llm=null", "model.vision_tower=null"] if name == "llava" else []
    recipe = load_recipe(file, [f"model.start_from={json.dumps({name: STARTS[name]})}", *drop])
    assert recipe.model.start_from.model_dump(exclude_none=True) == {name: STARTS[name]}


@pytest.mark.parametrize("names", [(), *combinations(STARTS, 2)])
def test_no_start_and_two_are_refused(file: Path, names: tuple[str, ...]) -> None:
    override = f"model.start_from={json.dumps({name: STARTS[name] for name in names})}"
    given_names = ", ".join(names) or "none"
    fails(file, [override], f"model.start_from: give exactly one of {START_NAMES}; given: {given_names}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=1"], "lora is set in a Stage 1 recipe, which trains only the projector; drop it or set stage: 2"),
        (["lora=null"], "lora is missing; Stage 2 trains adapters; lora: {} has the defaults"),
        (
            ["stage=1", "lora=null", "model.start_from={stage1_run: x}"],
            "model.start_from names a Stage 1 result in a Stage 1 recipe; use untrained: true",
        ),
        (
            ["stage=1", "lora=null", "data.format=captions", "data.template=vicuna_v1"],
            "data.template is vicuna_v1; use plain for captions in Stage 1",
        ),
        (
            ["data.format=captions", "evaluation={}"],
            "evaluation needs data.format scienceqa or conversations; it is captions",
        ),
        (
            ["model.start_from={llava: x}"],
            "model: llm is set together with start_from.llava, which is a complete LLaVA; drop one",
        ),
        (
            ["model.start_from={llava: x}", "model.llm=null"],
            "model: vision_tower is set together with start_from.llava, which is a complete LLaVA; drop one",
        ),
        (["model.llm=null"], "model: llm is missing; name a folder, a Hub id or demo"),
        (["model.vision_tower=null"], "model: vision_tower is missing; name a folder, a Hub id or demo"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(file: Path, overrides: list[str], message: str) -> None:
    fails(file, overrides, message)


def test_a_stage_1_recipe(file: Path) -> None:
    recipe = load_recipe(file, ["stage=1", "lora=null", "data.format=captions", "data.template=plain"])
    assert (recipe.stage, recipe.lora, recipe.data.template) == (1, None, "plain")


@settings(max_examples=60, deadline=None)
@given(
    folder=WORDS,
    system=st.none() | WORDS,
    rate=st.floats(1e-300, 1e300),
    seed=st.integers(),
    targets=st.lists(st.sampled_from(["q_proj", "v_proj", "up_proj"]), min_size=1, unique=True),
)
def test_what_is_written_reads_back_equal(
    folder: str, system: str | None, rate: float, seed: int, targets: list[str]
) -> None:
    content = parse_yaml(MINIMAL, "here") | {"output_dir": folder, "seed": seed}
    content["data"]["system_prompt"], content["training"]["learning_rate"] = system, rate
    content["lora"]["targets"] = targets
    recipe = check_recipe(content, "here")
    again = check_recipe(parse_yaml(dump_recipe(recipe), "dump"), "dump")
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)
    assert dump_recipe(again) == dump_recipe(recipe)


@pytest.mark.parametrize("text", ["no", "2e-5", "null", "", " a ", "a\nb\n\n c\n", "a\tb", "x: y", "- a", "\u2028"])
def test_texts_that_look_like_something_else_read_back(file: Path, text: str) -> None:
    recipe = load_recipe(file, [f"data.system_prompt={json.dumps(text)}"])
    assert recipe.data.system_prompt == text
    assert check_recipe(parse_yaml(dump_recipe(recipe), "dump"), "dump") == recipe


def test_a_next_line_character_reads_back(file: Path) -> None:
    recipe = load_recipe(file, ['data.system_prompt="a\\Nb"'])
    assert recipe.data.system_prompt == "a\x85b"
    assert check_recipe(parse_yaml(dump_recipe(recipe), "dump"), "dump") == recipe


def test_the_hash_is_over_all_but_the_output(file: Path) -> None:
    plain = recipe_hash(load_recipe(file))
    assert re.fullmatch("[0-9a-f]{64}", plain)
    assert recipe_hash(load_recipe(file, ["output_dir=elsewhere"])) == plain
    assert recipe_hash(load_recipe(file, ["seed=1"])) != plain
    assert recipe_hash(load_recipe(file, ["lora.r=65"])) != plain
