"""Adapters on the vision tower: on the layers that train, with their own rank and learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlavaConfig, LlavaForConditionalGeneration

from lora_llava.model.adapters import lora_config, planned_parameters
from lora_llava.model.base import assembled_config
from lora_llava.model.fast_path.trained_loss import labelled_loss
from lora_llava.model.loading import load_base
from lora_llava.model.start import prepare_base
from lora_llava.model.vision_adapters import VisionAdapters, used_layers, vision_adapters
from lora_llava.planning.run_plan import plan_run, run_lora_config
from lora_llava.publishing.adapter_tensors import read_adapter
from lora_llava.recipe.io import RecipeError, check_recipe
from lora_llava.recipe.schema import LINEARS, VISION_LINEARS
from lora_llava.training.parameter_groups import parameter_groups
from lora_llava.training.stages import build_feeds, build_trained_model, learning_rates
from tests.training.choices import base_of, chosen, logits_of, merges, resumes_to_the_bit, stock, trained_model
from tests.training.small_runs import content_for_ranks, one_and_two, weights

VISION = {"r": 2, "alpha": 6.0, "learning_rate": 1e-3}


@pytest.fixture
def content(stage2_content: dict[str, Any]) -> dict[str, Any]:
    return chosen(stage2_content, lora={"vision": VISION})


def test_only_layers_up_to_the_features_have_adapters(content: dict[str, Any]) -> None:
    recipe = check_recipe(content, "test")
    model = build_trained_model(recipe, prepare_base(recipe.model, 0))
    config = model.get_base_model().config
    assert config.vision_config.num_hidden_layers == 3
    names = [n for n, p in model.named_parameters() if p.requires_grad and "vision_tower" in n]
    assert {n.split("layers.")[1].split(".")[0] for n in names} == {"0", "1"}
    assert len(names) == 2 * 6 * 2
    ranks = {p.shape[0] for n, p in model.named_parameters() if "lora_A" in n and "vision_tower" in n}
    assert ranks == {2}
    assert {p.shape[0] for n, p in model.named_parameters() if "lora_A" in n and "language_model" in n} == {4}
    planned = planned_parameters(config, run_lora_config(recipe, config))
    assert planned["vision_lora"] == sum(p.numel() for n, p in model.named_parameters() if n in names)


@pytest.mark.parametrize(("layer", "used"), [(-2, 23), (-1, 24), (3, 3), ([-2, -5, 7], 23)])
def test_used_layers_of_a_feature_layer(layer: Any, used: int) -> None:
    config = assembled_config({"model_type": "llama"}, {"num_hidden_layers": 24}, "mlp2x_gelu")
    config.vision_feature_layer = layer
    assert used_layers(config) == used


def test_vicuna_and_clip_l_are_counted() -> None:
    config = assembled_config(
        {"model_type": "llama", "vocab_size": 32000},
        {
            "num_hidden_layers": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 336,
        },
        "mlp2x_gelu",
    )
    vision = VisionAdapters(8, 8, VISION_LINEARS, used_layers(config))
    counts = planned_parameters(config, lora_config(r=64, targets=LINEARS, vision=vision))
    assert counts["vision_lora"] == 23 * 8 * (4 * 2 * 1024 + 2 * 5 * 1024)
    assert counts["lora"] == 159_907_840


def plain_peft(base: Path, config: LlavaConfig, sources: Any) -> Any:
    """The same model by plain PEFT: stock forward, no package code; its weights are copied from `sources`."""
    stock_model = LlavaForConditionalGeneration.from_pretrained(base, dtype="float32")
    layers = "|".join(map(str, range(2)))
    pattern = (
        rf".*vision_tower\..*layers\.({layers})\.(self_attn|mlp)\.({'|'.join(VISION_LINEARS)})"
        rf"|.*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(LINEARS)})$"
    )
    model = get_peft_model(
        stock_model,
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=pattern,
            rank_pattern={r".*vision_tower\..*": 2},
            alpha_pattern={r".*vision_tower\..*": 6.0},
            modules_to_save=["multi_modal_projector"],
        ),
    )
    model.load_state_dict(sources.state_dict())
    return model


def test_gradients_are_those_of_plain_peft(content: dict[str, Any]) -> None:
    content["model"]["quantization"] = "none"
    recipe = check_recipe(content, "test")
    plan, base = plan_run(recipe), prepare_base(recipe.model, 0)
    ours = build_trained_model(recipe, base).train()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    theirs = plain_peft(base.folder, plan.model.config, ours).train()
    feed = build_feeds(plan)[0]
    sample = next(feed.samples[i] for row in feed.rows for i in row if feed.samples[i]["image_files"])
    batch = feed.collator([sample])
    loss = labelled_loss(ours, batch)[0]
    loss.backward()
    split = plan.splits["train"]
    ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])
    logits = theirs(input_ids=ids, pixel_values=split.load_pixels(sample["image_files"]), use_cache=False).logits
    wanted = torch.nn.functional.cross_entropy(logits[0, :-1].float(), labels[0, 1:], reduction="sum")
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert any("vision_tower" in name for name in gradients)
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_rows_without_images_give_zero_gradients_and_not_none(content: dict[str, Any]) -> None:
    recipe = check_recipe(content, "test")
    plan, base = plan_run(recipe), prepare_base(recipe.model, 0)
    model = build_trained_model(recipe, base).train()
    feed = build_feeds(plan)[0]
    sample = next(feed.samples[i] for row in feed.rows for i in row if not feed.samples[i]["image_files"])
    labelled_loss(model, feed.collator([sample]))[0].backward()
    found = [p.grad for n, p in model.named_parameters() if p.requires_grad and "vision_tower" in n]
    assert len(found) == 24
    assert all(gradient is not None and not gradient.any() for gradient in found)


def test_the_tower_has_its_own_rate(content: dict[str, Any]) -> None:
    recipe = check_recipe(content, "test")
    model = build_trained_model(recipe, prepare_base(recipe.model, 0))
    groups = parameter_groups(model.named_parameters(), learning_rates(recipe), 0.0)
    assert sorted((group["lr"], len(group["params"])) for group in groups) == [
        (1e-3, 24),
        (5e-3, 2),
        (5e-3, 2),
        (5e-3, 28),
    ]


def test_a_run_loads_in_stock_peft_merges_and_shows_its_parts(content: dict[str, Any], tmp_path: Path) -> None:
    recipe, plan, model = trained_model(content)
    folder = Path(recipe.output_dir)
    adapter = read_adapter(folder)
    vision = {name: layer.scaling for name, layer in adapter.layers.items() if "vision_tower" in name}
    assert len(vision) == 12
    assert set(vision.values()) == {3.0}
    loaded = load_base(base_of(folder), quantization="nf4", dtype="float32")
    found, expected = logits_of(stock(folder, loaded), plan), logits_of(model, plan)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for base in ("bf16", "nf4"):
        report = merges(folder, tmp_path / base, base)
        assert report[report["checked_against"]]["max_logit_difference"] <= report["tolerance"]
    assert plan.trained_parameters["vision_lora"] == sum(
        p.numel() for n, p in model.named_parameters() if p.requires_grad and "vision_tower" in n
    )


def test_a_run_resumes_to_the_bit(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = resumes_to_the_bit(content, monkeypatch)
    assert all(tensor.any() for name, tensor in found.items() if "vision_tower" in name)


@pytest.mark.more
def test_two_processes_train_as_one(parts: Path, scienceqa: Path, tmp_path: Path) -> None:
    content = chosen(content_for_ranks(parts, scienceqa), lora={"vision": VISION})
    one, two, _ = one_and_two(content, tmp_path)
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_vision_cache_is_refused(content: dict[str, Any]) -> None:
    content["training"]["vision_cache"] = "memory"
    with pytest.raises(RecipeError, match=r"training\.vision_cache is memory together with lora\.vision.*set training"):
        check_recipe(content, "test")


def test_alpha_is_r_by_default() -> None:
    config = assembled_config({"model_type": "llama"}, {}, "mlp2x_gelu")
    assert vision_adapters({"r": 16, "alpha": None, "targets": ("q_proj",)}, config).alpha == 16
