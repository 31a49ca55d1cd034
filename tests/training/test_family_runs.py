"""Runs of other families and towers from recipe to merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lora_llava import evaluate, finetune, merge
from lora_llava.recipe import Recipe
from lora_llava.recipe.io import check_recipe
from tests.model.small_families import make_llm, make_tower


def recipe_of(content: dict[str, Any], folder: Path, family: str, tower: str) -> Recipe:
    llm = make_llm(folder / family, family, demo_tokenizer=True, max_position_embeddings=2048)
    content["model"] |= {
        "llm": str(llm),
        "vision_tower": str(make_tower(folder / tower, tower)),
    }
    content["training"] |= {"max_steps": 2}
    return check_recipe(content, "test")


@pytest.mark.parametrize(
    ("family", "tower", "more"),
    [
        ("qwen2", "siglip", {"vision_cache": "memory"}),
        ("phi3", "clip", {}),
        ("gemma3_text", "siglip", {"gradient_checkpointing": True}),
        ("olmo2", "clip", {}),
    ],
)
def test_a_run_is_trained_evaluated_and_merged(
    stage2_content: dict[str, Any], tmp_path: Path, family: str, tower: str, more: dict[str, Any]
) -> None:
    stage2_content["training"] |= more
    recipe = recipe_of(stage2_content, tmp_path, family, tower)
    result = finetune(recipe, quiet=True)
    assert result is not None
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
