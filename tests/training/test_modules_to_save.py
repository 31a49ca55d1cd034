"""Embeddings and head trained in full: float32, saved under PEFT's names, merged exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_llava.core.errors import UserError
from lora_llava.model.loading import load_base
from lora_llava.planning.run_plan import plan_run
from lora_llava.recipe.io import RecipeError, check_recipe
from lora_llava.training.stages import describe_plan
from tests.training.choices import (
    after_backward,
    base_of,
    chosen,
    logits_of,
    merges,
    resumes_to_the_bit,
    stock,
    trained_model,
)

BOTH = ["lm_head", "embed_tokens"]
NAMES = {
    "lm_head": ("base_model.model.lm_head.weight", "language_model.lm_head.weight"),
    "embed_tokens": (
        "base_model.model.model.language_model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("names", [BOTH, ["lm_head"], ["embed_tokens"]])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_run_loads_in_stock_peft_and_merges_exactly(
    names: list[str], quantization: str, stage2_content: dict[str, Any], tmp_path: Path
) -> None:
    content = chosen(stage2_content, lora={"modules_to_save": names}, model={"quantization": quantization})
    recipe, plan, model = trained_model(content)
    folder = Path(recipe.output_dir)
    saved = load_file(folder / "adapter_model.safetensors")
    base = load_file(base_of(folder) / "model.safetensors")
    loaded = load_base(base_of(folder), quantization=quantization, dtype="float32")  # type: ignore[arg-type]
    assert torch.equal(logits_of(stock(folder, loaded), plan), logits_of(model, plan))
    kind = "nf4" if quantization == "nf4" else "bf16"
    report = merges(folder, tmp_path / "merged", kind)
    assert report[report["checked_against"]]["max_logit_difference"] <= report["tolerance"]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, (in_run, in_base) in NAMES.items():
        assert (in_run in saved) == (name in names)
        if name in names:
            assert saved[in_run].dtype == torch.float32
            assert not torch.equal(saved[in_run], base[in_base].float())
            assert torch.equal(merged[in_base], saved[in_run])
        else:
            assert torch.equal(merged[in_base], base[in_base].float())
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == [
        "multi_modal_projector",
        *names,
    ]


def test_it_trains_in_float32_on_a_bfloat16_base(stage2_content: dict[str, Any]) -> None:
    content = chosen(stage2_content, lora={"modules_to_save": BOTH}, model={"dtype": "bfloat16"})
    recipe, plan, model = trained_model(content)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "lm_head" in n and n not in trained} == {torch.bfloat16}
    rows = {row["module"]: row for row in describe_plan(model)}
    assert rows["head"]["trained"]
    assert rows["embeddings"]["trained"]
    assert rows["head"]["dtype"] == "float32"
    assert (
        plan.trained_parameters["lm_head"] == trained["base_model.model.lm_head.modules_to_save.default.weight"].numel()
    )
    assert recipe.lora is not None


def test_gradients_are_those_of_a_plain_model(stage2_content: dict[str, Any]) -> None:
    recipe = check_recipe(
        chosen(stage2_content, lora={"modules_to_save": BOTH}, model={"quantization": "none"}), "test"
    )
    _, ours, plain = after_backward(recipe)
    found = {name.split(".modules_to_save")[0]: p.grad for name, p in ours.named_parameters() if "modules_to" in name}
    for name, theirs in (("lm_head", plain.lm_head), ("embed_tokens", plain.model.language_model.embed_tokens)):
        gradient = next(value for key, value in found.items() if key.endswith(name))
        torch.testing.assert_close(gradient, theirs.weight.grad, rtol=1e-4, atol=1e-5)


def test_a_run_resumes_to_the_bit(stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    resumes_to_the_bit(chosen(stage2_content, lora={"modules_to_save": BOTH}), monkeypatch)


def test_tied_matrices_are_refused(stage2_content: dict[str, Any], parts: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(parts / "llm", tmp_path / "llm")
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    content = chosen(stage2_content, lora={"modules_to_save": ["lm_head"]}, model={"llm": str(tmp_path / "llm")})
    with pytest.raises(UserError, match=r"^lora\.modules_to_save names lm_head, but this model's embeddings and head"):
        plan_run(check_recipe(content, "test"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lm_head", "lm_head"], r"modules_to_save names a module twice; keep one"),
        (["norm"], r"lora\.modules_to_save\.0 is 'norm'; it should be 'lm_head' or 'embed_tokens'"),
    ],
)
def test_other_names_are_refused(names: list[str], message: str, stage2_content: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=message):
        check_recipe(chosen(stage2_content, lora={"modules_to_save": names}), "test")
