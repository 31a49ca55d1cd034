"""How adapters start: orthogonal, EVA and LoftQ; all merge, load in stock PEFT and resume to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from lora_llava.core.errors import UserError
from lora_llava.inference.load import load_answering_model
from lora_llava.model.adapters import trained_projector
from lora_llava.model.initialization import lora_layers, start_eva, start_loftq, start_orthogonal
from lora_llava.model.loading import load_base
from lora_llava.model.start import prepare_base, read_run_projector
from lora_llava.planning.run_plan import plan_run
from lora_llava.recipe.io import RecipeError, check_recipe
from lora_llava.training.stages import build_feeds, build_trained_model
from tests.training.choices import base_of, chosen, logits_of, merges, resumes_to_the_bit, stock, trained_model
from tests.training.small_runs import content_for_ranks, one_and_two, recipe_of, run, weights

INITS = ("orthogonal", "eva", "loftq")


def built(content: dict[str, Any], **lora: Any) -> tuple[PeftModel, Path]:
    recipe = check_recipe(chosen(content, lora=lora), "test")
    base = prepare_base(recipe.model, 0)
    return build_trained_model(recipe, base), base.folder


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_orthogonal_starts_are_those_of_peft_on_a_float32_layer(
    stage2_content: dict[str, Any], quantization: str
) -> None:
    stage2_content["model"]["quantization"] = quantization
    model, _ = built(stage2_content)
    torch.manual_seed(0)
    start_orthogonal(model)
    adapter = model.active_adapter
    torch.manual_seed(0)
    numbers = torch.get_rng_state()
    for layer in lora_layers(model).values():
        plain = get_peft_model(
            nn.Sequential(nn.Linear(layer.in_features, layer.out_features, device="meta")),
            LoraConfig(r=4, target_modules=["0"]),
        )
        theirs: Any = next(module for module in plain.modules() if isinstance(module, LoraLayer))
        torch.set_rng_state(numbers)
        theirs.orthogonal_init("default")
        numbers = torch.get_rng_state()
        for ours, other in ((layer.lora_A, theirs.lora_A), (layer.lora_B, theirs.lora_B)):
            assert ours[adapter].weight.dtype == torch.float32
            assert ours[adapter].weight.requires_grad
            assert torch.equal(ours[adapter].weight, other["default"].weight)
        product = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
        assert product.abs().max() < 1e-6


def test_loftq_leaves_the_smallest_error_that_its_rank_can(stage2_content: dict[str, Any]) -> None:
    model, folder = built(stage2_content, r=8, alpha=4)
    stored = load_file(folder / "model.safetensors")
    start_loftq(model, folder)
    for name, layer in lora_layers(model).items():
        packed: Any = layer.get_base_layer().weight
        file_name = name.replace("model.language_model.", "language_model.model.") + ".weight"
        error = stored[file_name].float() - dequantize_4bit(packed.data, packed.quant_state).float()
        least = torch.linalg.svdvals(error)[8:].norm()
        left = float((error - layer.get_delta_weight(model.active_adapter)).detach().norm())
        assert left == pytest.approx(float(least), rel=1e-4)
        assert left < 0.9 * error.norm()


def test_eva_gives_each_layer_a_rank_from_one_budget(stage2_content: dict[str, Any]) -> None:
    recipe = check_recipe(chosen(stage2_content, lora={"init": "eva"}), "test")
    plan, base = plan_run(recipe), prepare_base(recipe.model, 0)
    feed = build_feeds(plan)[0]
    found = []
    for _ in range(2):
        model = build_trained_model(recipe, base)
        pattern = model.peft_config["default"].target_modules
        before = logits_of(model, plan)
        start_eva(model, (feed.collator([feed.samples[i] for i in row]) for row in feed.rows))
        torch.testing.assert_close(logits_of(model, plan), before)
        config = model.peft_config["default"]
        assert (config.target_modules, config.init_lora_weights, config.eva_config) == (pattern, True, None)
        layers = lora_layers(model)
        ranks = {name: layer.r["default"] for name, layer in layers.items()}
        assert sum(ranks.values()) == 14 * 4
        assert max(ranks.values()) <= 8
        assert len(set(ranks.values())) > 1
        assert {layer.scaling["default"] for layer in layers.values()} == {2.0}
        assert len(layers) + len(config.exclude_modules or ()) == 14
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        for layer in layers.values():  # the directions are orthonormal
            directions = layer.lora_A["default"].weight
            torch.testing.assert_close(directions @ directions.T, torch.eye(len(directions)), rtol=0, atol=1e-4)
        found.append({name: layer.lora_A["default"].weight for name, layer in layers.items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("attention", ["sdpa", "flash_varlen"])
def test_eva_reads_padded_and_packed_rows(attention: str, stage2_content: dict[str, Any]) -> None:
    content = chosen(stage2_content, model={"attention": attention}, lora={"init": "eva"})
    _, _, model = trained_model(chosen(content, training={"max_steps": 1, "eval_every": 1}))
    assert sum(layer.r["default"] for layer in lora_layers(model).values()) == 14 * 4


def test_eva_uses_the_projector_of_stage_1(
    stage1_content: dict[str, Any], stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(check_recipe(stage1_content, "test"))
    content = chosen(
        stage2_content,
        model={"start_from": {"stage1_run": stage1_content["output_dir"]}},
        lora={"init": "eva"},
    )
    projectors = []

    def seen(model: Any, batches: Any) -> None:
        projectors.append(trained_projector(model).linear_1.weight.detach().clone())  # type: ignore[union-attr, operator]
        start_eva(model, batches)

    monkeypatch.setattr("lora_llava.training.adapter_start.start_eva", seen)
    recipe = recipe_of(content, max_steps=1, eval_every=1)
    run(recipe)
    assert torch.equal(projectors[0], read_run_projector(Path(stage1_content["output_dir"]))["linear_1.weight"])


@pytest.mark.more
@pytest.mark.parametrize("init", INITS)
def test_two_processes_start_and_train_as_one(init: str, parts: Path, scienceqa: Path, tmp_path: Path) -> None:
    content = chosen(content_for_ranks(parts, scienceqa, "nf4"), lora={"init": init})
    one, two, _ = one_and_two(content, tmp_path)
    first, second = weights(one), weights(two)
    assert {name: t.shape for name, t in first.items()} == {name: t.shape for name, t in second.items()}
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-2, atol=2e-3)


def test_eva_needs_enough_tokens(stage2_content: dict[str, Any]) -> None:
    model, _ = built(stage2_content)
    with pytest.raises(UserError, match=r"lora.init: eva needs rows of at least 8 tokens, for lora.r 4; use default"):
        start_eva(model, [{"input_ids": torch.ones(1, 3, dtype=torch.long)}])


@pytest.mark.parametrize("init", INITS)
def test_a_run_loads_in_stock_peft_and_merges(init: str, stage2_content: dict[str, Any], tmp_path: Path) -> None:
    content = chosen(stage2_content, lora={"init": init}, training={"max_steps": 2})
    recipe, plan, model = trained_model(content)
    folder = Path(recipe.output_dir)
    loaded = load_base(base_of(folder), quantization="nf4", dtype="float32")
    assert torch.equal(logits_of(stock(folder, loaded), plan), logits_of(model, plan))
    assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] is True
    if init == "loftq":
        with pytest.raises(UserError, match=r"--base bf16: .* corrects NF4's rounding; use --base nf4$"):
            merges(folder, tmp_path / "merged")
        with pytest.raises(UserError, match=r"corrects NF4's rounding .*; load it with quantization nf4$"):
            load_answering_model(str(base_of(folder)), folder)
    report = merges(folder, tmp_path / "merged", "nf4")
    checked = report[report["checked_against"]]
    assert checked["max_logit_difference"] <= report["tolerance"]
    assert checked["greedy_equal"] == checked["prompts"]


@pytest.mark.parametrize(
    "init", ["orthogonal", *(pytest.param(name, marks=pytest.mark.more) for name in INITS if name != "orthogonal")]
)
def test_a_run_resumes_to_the_bit(init: str, stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    resumes_to_the_bit(chosen(stage2_content, lora={"init": init}), monkeypatch)


@pytest.mark.more
def test_a_resumed_run_starts_nothing_again(stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(chosen(stage2_content, lora={"init": "eva"}), max_steps=4, save_every=2, eval_every=4)
    assert "eva: " in run(recipe)
    (Path(recipe.output_dir) / "run.json").unlink()
    (Path(recipe.output_dir) / "metrics.json").unlink()
    monkeypatch.setattr("lora_llava.training.adapter_start.start_eva", None)
    assert "eva: " not in run(recipe, resume=True)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"lora": {"init": "pissa"}}, r"lora\.init: pissa is not offered: it needs a decomposition of the unquantized"),
        ({"lora": {"init": "olora"}}, r"lora\.init: olora is not offered: it rewrites the base's weights"),
        ({"lora": {"init": "gaussian"}}, r"lora\.init is 'gaussian'; it should be 'default', 'orthogonal', 'eva' or"),
        ({"lora": {"init": "orthogonal", "r": 5}}, r"r is 5, and init orthogonal needs an even rank; make it even"),
        (
            {"lora": {"init": "loftq"}, "model": {"quantization": "none"}},
            r"model\.quantization is none; set model\.quantization: nf4",
        ),
        ({"lora": {"init": "eva", "dora": True}}, r"init is eva together with dora"),
    ],
)
def test_starts_that_cannot_be_are_refused(choices: Any, message: str, stage2_content: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        check_recipe(chosen(stage2_content, **choices), "test")
    assert "\n" not in str(error.value)
