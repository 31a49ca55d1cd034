"""What a message names as meant: keys in the wrong section or by another tool's name, and values of the wrong kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_llava.recipe import RecipeError, load_generate_recipe, load_recipe
from lora_llava.recipe.io import recipes_folder
from lora_llava.recipe.mistakes import OTHER_NAMES, section_at
from lora_llava.recipe.schema import Recipe

RECIPE = recipes_folder() / "demo_scienceqa_qlora.yaml"


def message(override: str, recipe: Path = RECIPE) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [override])
    return str(caught.value).removeprefix(f"{recipe}: ")


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("lora.rank=8", '"lora.r"'),
        ("epochs=3", '"training.epochs"'),
        ("report_to=wandb", '"training.report_to"'),
        ("before=false", '"evaluation.before"'),
        ("validation_rows=0", '"data.validation_rows"'),
        ("lr=1e-4", '"training.learning_rate"'),
        ("training.lr=1e-4", '"training.learning_rate"'),
        ("lora.lora_alpha=8", '"lora.alpha"'),
        ("model.load_in_4bit=true", '"model.quantization"'),
        ("training.per_device_train_batch_size=4", '"training.batch_size"'),
        ("training.bf16=true", '"model.dtype"'),
        ("cutoff_len=512", '"data.max_length"'),
        ("batch_size=4", '"training.batch_size" or "evaluation.batch_size"'),
        ("LearningRate=1", '"training.learning_rate"'),
        ("learning-rate=1", '"training.learning_rate"'),
        ("lora.R=1", '"r"'),
        ("r=1", '"lora.r"'),
        ("peft={r: 1}", '"lora"'),
        ("dataset={path: x}", '"data"'),
        ("dataset=x", '"data.path"'),
        ("model.epochs=1", '"training.epochs"'),
    ],
)
def test_a_key_elsewhere_or_by_another_name(override: str, meant: str) -> None:
    key = override.partition("=")[0]
    assert message(override) == f"{key} is not a key of a recipe (did you mean {meant}?)"


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("training.report_to=wandb", "a list (did you mean [wandb]?)"),
        ("training.report_to=none", "a list (did you mean []?)"),
        ("training.report_to='Wandb, tensorboard'", "a list (did you mean [wandb, tensorboard]?)"),
        ("lora.targets=q_proj", "'all-linear' or a list (did you mean [q_proj]?)"),
        ("lora.vision=true", "a section with keys (did you mean {}?)"),
        ("evaluation=off", "a section with keys (did you mean null?)"),
        ("evaluation.before=false", "a valid integer or 'all' (did you mean 0?)"),
        ("evaluation.before='3'", "a valid integer or 'all' (did you mean 3?)"),
        ("evaluation.before=All", "a valid integer or 'all' (did you mean all?)"),
        ("training.max_steps=-1", "greater than or equal to 1 (did you mean null?)"),
        ("training.max_steps=None", "a valid integer (did you mean null?)"),
        ("training.gradient_checkpointing=yes", "'auto' or a valid boolean (did you mean true?)"),
        ("training.group_by_length=Off", "a valid boolean (did you mean false?)"),
        ("training.learning_rate='1e-4'", "a valid number (did you mean 0.0001?)"),
        ("training.warmup_ratio=3%", "a valid number (did you mean 0.03?)"),
        ("training.save_every=1 hour", 'a valid integer or a text such as "30 min" (did you mean "60 min"?)'),
        ("model.quantization=4bit", "'nf4' or 'none' (did you mean nf4?)"),
        ("model.quantization=false", "'nf4' or 'none' (did you mean none?)"),
        ("model.dtype=bf16", "'auto', 'bfloat16', 'float16' or 'float32' (did you mean bfloat16?)"),
        ("model.dtype=fp16", "'auto', 'bfloat16', 'float16' or 'float32' (did you mean float16?)"),
        ("data.max_train_rows='1,000'", "a valid integer (did you mean 1000?)"),
        ("output_dir=5", 'a valid string (did you mean "5"?)'),
        ("seed=abc", "a valid integer"),
    ],
)
def test_a_value_of_the_wrong_kind(override: str, meant: str) -> None:
    assert message(override).partition("it should be ")[2] == meant


def test_what_is_meant_is_accepted() -> None:
    for override in ("training.report_to=[wandb]", "evaluation.before=0", "training.max_steps=null", "lora.vision={}"):
        load_recipe(RECIPE, ["training.vision_cache=off", override])


def test_every_other_name_leads_to_a_key() -> None:
    for key in set(OTHER_NAMES) - {"training.early_stopping"}:
        *outer, name = key.split(".")
        assert name in section_at(Recipe, outer).model_fields, key
    names = " ".join(OTHER_NAMES.values()).split()
    assert len(names) == len(set(names))


def test_a_recipe_of_generated_data_is_given_its_own_keys() -> None:
    with pytest.raises(RecipeError) as caught:
        load_generate_recipe("demo_generate.yaml", ["lr=3", "model_name=x"])
    assert [line.partition(": ")[2] for line in str(caught.value).splitlines()] == [
        "lr is not a key of a recipe",
        "model_name is not a key of a recipe",
    ]


def test_evaluation_without_held_out_rows(tmp_path: Path) -> None:
    overrides = ["data={format: conversations, path: x.json}", "evaluation={}"]
    with pytest.raises(RecipeError) as caught:
        load_recipe(RECIPE, overrides)
    assert str(caught.value) == (
        f"{RECIPE}: evaluation needs held-out rows, and data.validation_rows and data.test_rows are 0; set "
        "data.validation_rows=20, or evaluation=null to train without"
    )
