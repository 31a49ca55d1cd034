"""Choices of what trains, together, in evaluation, with a separate base, and where they are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from lora_llava import evaluate
from lora_llava.core.errors import UserError
from lora_llava.distributed.sharding import check_sharding
from lora_llava.model.loading import load_base
from lora_llava.publishing.merge import merge
from lora_llava.recipe.io import check_recipe
from tests.training.choices import base_of, chosen, logits_of, merges, quiet, resumes_to_the_bit, stock, trained_model
from tests.training.small_runs import content_for_ranks, one_and_two, run, weights

MANY = [f"<new_{index}>" for index in range(70)]
VISION: dict[str, Any] = {"r": 2, "learning_rate": 1e-3}
ALL: dict[str, dict[str, Any]] = {
    "vision, tokens, orthogonal": {
        "lora": {"vision": VISION, "init": "orthogonal"},
        "model": {"new_tokens": ["colour"]},
        "training": {"loraplus_ratio": 4.0},
    },
    "vision, matrices, loftq": {
        "lora": {"vision": VISION, "init": "loftq", "modules_to_save": ["lm_head", "embed_tokens"], "rslora": True},
        "training": {"loraplus_ratio": 4.0},
    },
    "tokens, eva": {"lora": {"init": "eva", "rslora": True}, "model": {"new_tokens": MANY}},
    "vision, eva": {"lora": {"init": "eva", "vision": VISION, "modules_to_save": ["embed_tokens"]}},
    "vision, dora": {"lora": {"vision": VISION, "dora": True, "dropout": 0.1}},
}


@pytest.mark.parametrize("name", ALL)
def test_they_load_merge_and_are_evaluated(name: str, stage2_content: dict[str, Any], tmp_path: Path) -> None:
    content = chosen(stage2_content, **ALL[name])
    recipe, plan, model = trained_model(content)
    folder = Path(recipe.output_dir)
    loaded = load_base(base_of(folder), quantization="nf4", dtype="float32")
    torch.testing.assert_close(logits_of(stock(folder, loaded), plan), logits_of(model, plan), rtol=0, atol=1e-5)
    report = merges(folder, tmp_path / "merged", "nf4")
    assert report[report["checked_against"]]["max_logit_difference"] <= report["tolerance"]


@pytest.mark.parametrize("name", ALL)
def test_they_resume_to_the_bit(name: str, stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    resumes_to_the_bit(chosen(stage2_content, **ALL[name]), monkeypatch)


def test_a_run_with_all_of_it_is_evaluated_before_and_after(stage2_content: dict[str, Any]) -> None:
    content = chosen(stage2_content, **ALL["vision, tokens, orthogonal"])
    recipe = check_recipe(content | {"evaluation": {"max_new_tokens": 4}}, "test")
    output = run(recipe)
    assert "LoRA adapters, vision tower" in output
    assert "new tokens" in output
    metrics = json.loads((Path(recipe.output_dir) / "metrics.json").read_text())
    assert evaluate(recipe.output_dir, quiet=True) == metrics["after"]
    assert (
        "vision tower r 2, alpha 2; init orthogonal; LoRA+ 4" in (Path(recipe.output_dir) / "report.html").read_text()
    )


@pytest.mark.parametrize("choices", [{"model": {"new_tokens": MANY}}, {"lora": {"modules_to_save": ["lm_head"]}}])
def test_a_separate_base_has_what_lora_does_not(
    choices: dict[str, Any], stage2_content: dict[str, Any], tmp_path: Path
) -> None:
    choices["lora"] = choices.get("lora", {}) | {"vision": VISION}
    recipe, plan, model = trained_model(chosen(stage2_content, **choices))
    merge(Path(recipe.output_dir), tmp_path / "two", dtype="float32", projector_only=True, console=quiet())
    config = json.loads((tmp_path / "two" / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert config["trainable_token_indices"] is None
    saved = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in saved)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "two" / "base", dtype="float32")
    with_nf4 = load_base(tmp_path / "two" / "base", quantization="nf4", dtype="float32")
    found = logits_of(stock(tmp_path / "two" / "adapter", with_nf4), plan)
    torch.testing.assert_close(found, logits_of(model, plan), rtol=0, atol=1e-4)
    assert base.config.text_config.vocab_size == plan.model.config.text_config.vocab_size


def test_new_tokens_begin_from_stage_1(stage1_content: dict[str, Any], stage2_content: dict[str, Any]) -> None:
    run(check_recipe(stage1_content, "test"))
    start = {"start_from": {"stage1_run": stage1_content["output_dir"]}, "new_tokens": MANY}
    _, plan, _ = trained_model(chosen(stage2_content, model=start, training={"max_steps": 1, "eval_every": 1}))
    assert plan.tokenizer.convert_tokens_to_ids(MANY[-1]) < plan.model.config.text_config.vocab_size


@pytest.mark.more
def test_two_processes_train_full_matrices_and_tokens_as_one(parts: Path, scienceqa: Path, tmp_path: Path) -> None:
    for name, choices in (
        ("full", {"lora": {"modules_to_save": ["lm_head", "embed_tokens"]}}),
        ("rows", {"model": {"new_tokens": ["colour", "<defect>"]}}),
    ):
        (tmp_path / name).mkdir()
        one, two, _ = one_and_two(chosen(content_for_ranks(parts, scienceqa), **choices), tmp_path / name)
        first, second = weights(one), weights(two)
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            torch.testing.assert_close(second[key], tensor, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("choices", "key"),
    [
        ({"lora": {"vision": {}}}, r"lora\.vision"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, r"lora\.modules_to_save"),
        ({"lora": {"init": "eva"}}, r"lora\.init"),
        ({"model": {"new_tokens": ["<a>"]}}, r"model\.new_tokens"),
    ],
)
def test_sharded_weights_are_refused(choices: Any, key: str, stage2_content: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^{key} has not been tested with weights that FSDP shards; drop it"):
        check_sharding(check_recipe(chosen(stage2_content, **choices), "test"), 2)
