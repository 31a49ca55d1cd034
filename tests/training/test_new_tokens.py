"""Tokens added to the vocabulary: encoded as ids, their rows alone trained, saved, merged and served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from lora_llava import evaluate
from lora_llava.core.errors import UserError
from lora_llava.data.encode import encode_conversation
from lora_llava.model.loading import load_base
from lora_llava.model.start import prepare_base
from lora_llava.planning.run_plan import plan_run
from lora_llava.recipe.io import RecipeError, check_recipe
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
from tests.training.small_runs import run

TOKENS = ["<defect>", "colour"]
"""The second one occurs in the rows."""
MANY = [f"<new_{index}>" for index in range(70)]
"""More than the padding of the vocabulary has rows for."""
ROWS = {
    "embed_tokens": (
        "base_model.model.model.language_model.embed_tokens.token_adapter.trainable_tokens_delta",
        "language_model.model.embed_tokens.weight",
    ),
    "lm_head": (
        "base_model.model.lm_head.token_adapter.trainable_tokens_delta",
        "language_model.lm_head.weight",
    ),
}


@pytest.fixture
def content(stage2_content: dict[str, Any]) -> dict[str, Any]:
    return chosen(stage2_content, model={"new_tokens": TOKENS})


def tied(content: dict[str, Any], parts: Path, folder: Path) -> dict[str, Any]:
    """Return the recipe with a language model whose embeddings and head are one matrix."""
    shutil.copytree(parts / "llm", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return chosen(content, model={"llm": str(folder)})


def test_texts_with_a_new_token_are_encoded_to_its_id(content: dict[str, Any]) -> None:
    plan = plan_run(check_recipe(content, "test"))
    first = len(plan.tokenizer) - 2
    assert plan.tokenizer.convert_tokens_to_ids(TOKENS) == [first, first + 1]
    assert first == plan.tokenizer.pad_token_id + 1
    rows = list(plan.splits["train"].rows)
    assert sum(row["input_ids"].count(first + 1) for row in rows) >= len(rows)
    messages = [
        {"role": "user", "content": "Is this a <defect>, or </s> typed?"},
        {"role": "assistant", "content": "a <defect>"},
    ]
    encoded = encode_conversation(messages, tokenizer=plan.tokenizer, template="vicuna_v1", num_image_tokens=4)
    assert encoded["input_ids"].count(first) == 2
    assert encoded["labels"].count(first) == 1
    assert encoded["input_ids"].count(plan.tokenizer.eos_token_id) == 1


def test_spare_rows_are_used_before_rows_are_added(stage2_content: dict[str, Any], content: dict[str, Any]) -> None:
    def folder_of(content: dict[str, Any]) -> Path:
        recipe = check_recipe(content, "test")
        return prepare_base(recipe.model, recipe.seed).folder

    plain, larger = folder_of(stage2_content), folder_of(chosen(content, model={"new_tokens": MANY}))
    assert folder_of(content) == plain
    assert larger != plain
    small, large = (load_file(folder / "model.safetensors") for folder in (plain, larger))
    for _, name in ROWS.values():
        rows = len(small[name])
        assert len(large[name]) == rows + 64
        assert torch.equal(large[name][:896], small[name][:896])
    plan = plan_run(check_recipe(chosen(content, model={"new_tokens": MANY}), "test"))
    assert plan.trained_parameters["new_tokens"] == 2 * 70 * 64


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("tokens", [TOKENS, [*TOKENS, *MANY]])
def test_a_run_trains_saves_loads_and_merges_their_rows(
    quantization: str, tokens: list[str], stage2_content: dict[str, Any], tmp_path: Path
) -> None:
    content = chosen(stage2_content, model={"new_tokens": tokens, "quantization": quantization})
    recipe, plan, model = trained_model(content)
    folder = Path(recipe.output_dir)
    ids = plan.tokenizer.convert_tokens_to_ids(tokens)
    saved, base = load_file(folder / "adapter_model.safetensors"), load_file(base_of(folder) / "model.safetensors")
    loaded = load_base(base_of(folder), quantization=quantization, dtype="float32")  # type: ignore[arg-type]
    assert torch.equal(logits_of(stock(folder, loaded), plan), logits_of(model, plan))
    report = merges(folder, tmp_path / "merged", "nf4" if quantization == "nf4" else "bf16")
    assert report[report["checked_against"]]["max_logit_difference"] <= report["tolerance"]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for in_run, in_base in ROWS.values():
        assert saved[in_run].dtype == torch.float32
        assert torch.equal(merged[in_base][ids], saved[in_run])
        assert not torch.equal(saved[in_run][1], base[in_base][ids[1]].float())
        others = [index for index in range(len(base[in_base])) if index not in ids]
        assert torch.equal(merged[in_base][others], base[in_base][others].float())
    for place in (folder, tmp_path / "merged"):
        tokenizer = AutoProcessor.from_pretrained(place, backend="pil").tokenizer
        assert tokenizer("a <defect>", add_special_tokens=False)["input_ids"][-1] == ids[0]
        assert not tokenizer.added_tokens_decoder[ids[0]].special


def test_gradients_are_rows_of_those_of_plain_matrices(content: dict[str, Any]) -> None:
    recipe = check_recipe(chosen(content, model={"quantization": "none"}), "test")
    plan, ours, plain = after_backward(recipe)
    new = plan.tokenizer.convert_tokens_to_ids(TOKENS)
    found = {name: p.grad for name, p in ours.named_parameters() if "trainable_tokens_delta" in name}
    assert len(found) == 2
    for name, theirs in (("lm_head", plain.lm_head), ("embed_tokens", plain.model.language_model.embed_tokens)):
        gradient = next(value for key, value in found.items() if name in key)
        torch.testing.assert_close(gradient, theirs.weight.grad[new], rtol=1e-4, atol=1e-5)
        assert gradient.any()


@pytest.mark.parametrize("tokens", [TOKENS, MANY])
def test_a_run_resumes_to_the_bit(
    tokens: list[str], stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    resumes_to_the_bit(chosen(stage2_content, model={"new_tokens": tokens}), monkeypatch)


def test_it_trains_in_float32_on_a_bfloat16_base(content: dict[str, Any]) -> None:
    _, _, model = trained_model(chosen(content, model={"dtype": "bfloat16"}))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_one_matrix_for_embeddings_and_head_stays_one(content: dict[str, Any], parts: Path, tmp_path: Path) -> None:
    recipe, plan, model = trained_model(tied(content, parts, tmp_path / "tied"))
    folder = Path(recipe.output_dir)
    found = {name: p for name, p in model.named_parameters() if p.requires_grad and "trainable_tokens_delta" in name}
    saved = load_file(folder / "adapter_model.safetensors")
    assert len([name for name in saved if "trainable_tokens_delta" in name]) == len(found) == 1
    assert plan.trained_parameters["new_tokens"] == 2 * 64
    loaded = load_base(base_of(folder), quantization="nf4", dtype="float32")
    assert torch.equal(logits_of(stock(folder, loaded), plan), logits_of(model, plan))
    report = merges(folder, tmp_path / "merged", "nf4")
    assert report[report["checked_against"]]["max_logit_difference"] <= report["tolerance"]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    rows = merged["language_model.model.embed_tokens.weight"][plan.tokenizer.convert_tokens_to_ids(TOKENS)]
    assert torch.equal(rows, next(tensor for name, tensor in saved.items() if "trainable_tokens_delta" in name))


def test_runs_and_merged_models_are_evaluated(content: dict[str, Any], tmp_path: Path) -> None:
    recipe = check_recipe(content | {"evaluation": {"before": 0, "max_new_tokens": 4}}, "test")
    run(recipe)
    merges(Path(recipe.output_dir), tmp_path / "merged", "nf4")
    for model in (Path(recipe.output_dir), tmp_path / "merged"):
        assert evaluate(str(model), quiet=True)


def test_a_complete_llava_gets_them_in_its_spare_rows(
    stage2_content: dict[str, Any], content: dict[str, Any], tmp_path: Path
) -> None:
    first = check_recipe(chosen(stage2_content, training={"max_steps": 1}), "test")
    run(first)
    merges(Path(first.output_dir), tmp_path / "llava", "nf4")
    start = {"start_from": {"llava": str(tmp_path / "llava")}, "llm": None, "vision_tower": None}
    content = chosen(content, model=start) | {"output_dir": str(tmp_path / "second")}
    recipe, plan, model = trained_model(content)
    folder = Path(recipe.output_dir)
    loaded = load_base(tmp_path / "llava", quantization="nf4", dtype="float32")
    assert torch.equal(logits_of(stock(folder, loaded), plan), logits_of(model, plan))
    merges(folder, tmp_path / "third", "nf4")
    many = chosen(content, model={"new_tokens": MANY})
    with pytest.raises(
        UserError, match=r"names 70 tokens, and the model's embeddings have 62 spare rows; name at most"
    ):
        plan_run(check_recipe(many, "test"))
    known = chosen(content, model=start | {"start_from": {"llava": str(tmp_path / "third")}})
    with pytest.raises(
        UserError, match=r"model\.new_tokens: '<defect>' is in the tokenizer already, with id \d+; leave"
    ):
        plan_run(check_recipe(known, "test"))


@pytest.mark.parametrize("token", ["<image>", "<pad>", "</s>"])
def test_known_tokens_are_refused(token: str, stage2_content: dict[str, Any]) -> None:
    content = chosen(stage2_content, model={"new_tokens": ["<a>", token]})
    with pytest.raises(UserError, match=r"^model\.new_tokens: '.*' is in the tokenizer already, with id \d+"):
        plan_run(check_recipe(content, "test"))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"model": {"new_tokens": ["a b"]}}, r"model\.new_tokens\.0 is 'a b'"),
        ({"model": {"new_tokens": ["<a>", "<a>"]}}, r"model\.new_tokens: '<a>' is named twice; keep one"),
        (
            {"model": {"new_tokens": ["<a>"]}, "lora": {"modules_to_save": ["lm_head"]}},
            r"model\.new_tokens is set together with lora\.modules_to_save, which trains all rows; drop one",
        ),
    ],
)
def test_recipes_that_cannot_be_are_refused(choices: Any, message: str, stage2_content: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=message):
        check_recipe(chosen(stage2_content, **choices), "test")
