"""Runs of other families and towers from recipe to merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lora_llava import evaluate, finetune, merge
from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.model.start import prepare_base
from lora_llava.planning.run_plan import plan_run
from lora_llava.recipe import Recipe, dump_recipe
from lora_llava.recipe.io import check_recipe
from lora_llava.recipe.schema import LINEARS
from lora_llava.runs.resume import check_changes
from tests.model.small_families import make_llm, make_tower


def recipe_of(content: dict[str, Any], folder: Path, family: str, tower: str) -> Recipe:
    llm = make_llm(folder / family, family, demo_tokenizer=True, max_position_embeddings=2048)
    content["model"] |= {
        "llm": str(llm),
        "vision_tower": str(make_tower(folder / tower, tower)),
    }
    content["data"]["template"] = "vicuna_v1"  # its tokenizer is the demo's, without a template of its own
    content["training"] |= {"max_steps": 2}
    content["evaluation"] = {"max_new_tokens": 2, "before": 0, "after": 2}
    return check_recipe(content, "test")


@pytest.mark.parametrize(("family", "tower"), [("phi3", "siglip"), ("gemma3_text", "clip"), ("starcoder2", "siglip")])
def test_the_plan_of_a_family_has_all_its_parts(
    stage2_content: dict[str, Any], tmp_path: Path, family: str, tower: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(stage2_content, tmp_path, family, tower)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert main("plan", [str(file)]) == 0
    printed = capsys.readouterr().out
    assert "vision tower" in printed
    assert "time: about" in printed
    assert ("warning: starcoder2 is not in the table" in printed) == (family == "starcoder2")
    recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"targets": ("gate_poj",)})})  # type: ignore[union-attr]
    with pytest.raises(UserError, match=f"lora.targets: {family} has no linear layer 'gate_poj'"):
        plan_run(recipe)


def test_a_complete_llava_of_another_family_is_trained(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(stage2_content, tmp_path, "qwen3", "siglip")
    folder = prepare_base(recipe.model, 0).folder
    stage2_content["model"] = {"start_from": {"llava": str(folder)}}
    stage2_content["training"] |= {"max_tokens_per_row": 500, "batch_size": 1, "max_steps": 1}
    finetune(check_recipe(stage2_content, "test"), quiet=True)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["train"]["steps"] == 1


def test_the_seven_names_of_earlier_recipes_are_all_linear(stage2: Recipe) -> None:
    assert stage2.lora is not None
    seven = stage2.model_copy(update={"lora": stage2.lora.model_copy(update={"targets": LINEARS})})
    assert check_changes(seven, stage2, (), 1) == check_changes(stage2, seven, (), 1) == ()
    fewer = stage2.model_copy(update={"lora": stage2.lora.model_copy(update={"targets": LINEARS[:2]})})
    with pytest.raises(UserError, match=r"lora\.targets was"):
        check_changes(fewer, stage2, (), 1)


@pytest.mark.parametrize(
    ("family", "tower", "more"),
    [
        ("qwen2", "siglip", {"vision_cache": "memory"}),
        pytest.param("phi3", "clip", {}, marks=pytest.mark.more),
        pytest.param("gemma3_text", "siglip", {"gradient_checkpointing": True}, marks=pytest.mark.more),
        ("olmo2", "clip", {}),
    ],
)
def test_a_run_is_trained_evaluated_and_merged(
    stage2_content: dict[str, Any], tmp_path: Path, family: str, tower: str, more: dict[str, Any]
) -> None:
    stage2_content["training"] |= more
    recipe = recipe_of(stage2_content, tmp_path, family, tower)
    finetune(recipe, quiet=True)
    run = Path(recipe.output_dir)
    evaluate(run, quiet=True)
    report = merge(run, tmp_path / "merged", quiet=True)
    assert report["adapter_on_bf16_base"]["max_logit_difference"] <= report["tolerance"]
    model, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_index
