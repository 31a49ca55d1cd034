"""LoRA+ as parameter groups: equal to PEFT's own, and the logged learning rate is that of the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from lora_llava.model.start import prepare_base
from lora_llava.recipe import load_recipe, recipe_hash
from lora_llava.recipe.io import LATER_KEYS, RecipeError, check_recipe
from lora_llava.training.parameter_groups import Rates, parameter_groups
from lora_llava.training.stages import build_trained_model, learning_rates
from tests.training.choices import chosen, resumes_to_the_bit
from tests.training.small_runs import recipe_of, run


@pytest.mark.parametrize("lora", [{}, {"dora": True}])
def test_the_rates_of_adapters_are_those_of_pefts_own_optimizer(
    stage2_content: dict[str, Any], lora: dict[str, Any]
) -> None:
    content = chosen(stage2_content, lora=lora, training={"loraplus_ratio": 8.0, "weight_decay": 0.1})
    recipe = check_recipe(content, "test")
    model = build_trained_model(recipe, prepare_base(recipe.model, 0))
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def table(groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
        # Ours leaves all vectors without weight decay, DoRA's magnitudes too.
        rows = {
            names[id(p)]: (group["lr"], group["weight_decay"] if p.ndim > 1 else 0.0)
            for group in groups
            for p in group["params"]
        }
        return {name: row for name, row in rows.items() if "multi_modal_projector" not in name}

    ours = parameter_groups(model.named_parameters(), learning_rates(recipe), 0.1)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=5e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    assert table(ours) == table(theirs.param_groups)
    assert {rate for rate, _ in table(ours).values()} == {5e-3, 4e-2}
    projector = {g["lr"] for g in ours for p in g["params"] if "multi_modal_projector" in names[id(p)]}
    assert projector == {5e-3}


def test_without_a_ratio_the_groups_are_those_of_earlier_versions(stage2_content: dict[str, Any]) -> None:
    recipe = check_recipe(stage2_content, "test")
    model = build_trained_model(recipe, prepare_base(recipe.model, 0))
    groups = parameter_groups(model.named_parameters(), Rates(adapters=1.0, projector=2.0), 0.1)
    found = [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups]
    assert sorted(found) == [(1.0, 0.1, 28), (2.0, 0.0, 2), (2.0, 0.1, 2)]


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_the_logged_rate_is_that_of_the_recipe(stage2_content: dict[str, Any], optimizer: str) -> None:
    content = chosen(stage2_content, lora={"vision": {"r": 2, "learning_rate": 0.5}})
    recipe = recipe_of(
        content,
        max_steps=3,
        eval_every=3,
        loraplus_ratio=4.0,
        projector_learning_rate=7.0,
        lr_scheduler="linear",
        optimizer=optimizer,
    )
    run(recipe)
    curve = json.loads((Path(recipe.output_dir) / "metrics.json").read_text())["train"]["curves"]["learning_rate"]
    assert [rate for _, rate in curve] == pytest.approx([5e-3, 5e-3 * 2 / 3, 5e-3 / 3])


def test_a_run_resumes_to_the_bit(stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    resumes_to_the_bit(chosen(stage2_content, training={"loraplus_ratio": 16.0}), monkeypatch)


def test_a_ratio_below_1_is_refused(stage2_content: dict[str, Any], stage1_content: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"training\.loraplus_ratio is 0\.5; it should be greater than or equal to 1"):
        check_recipe(chosen(stage2_content, training={"loraplus_ratio": 0.5}), "test")
    stage1_content["training"]["loraplus_ratio"] = 2.0
    with pytest.raises(RecipeError, match=r"training\.loraplus_ratio is set in a Stage 1 recipe"):
        check_recipe(stage1_content, "test")


def test_keys_at_their_defaults_leave_the_hash_of_a_recipe_as_it_was(stage2_content: dict[str, Any]) -> None:
    plain = recipe_hash(check_recipe(stage2_content, "test"))
    written = json.loads(json.dumps(stage2_content))
    for key, default in LATER_KEYS.items():
        *path, field = key.split(".")
        if path[0] in ("gates", "teacher"):  # of recipes that generate data
            continue
        section = written
        for name in path:
            section = section[name]
        section[field] = default
    assert recipe_hash(check_recipe(written, "test")) == plain
    assert recipe_hash(check_recipe(chosen(stage2_content, training={"loraplus_ratio": 2.0}), "test")) != plain


def test_a_recipe_written_before_these_keys_keeps_its_hash() -> None:
    file = Path(__file__).parents[1] / "earlier" / "things" / "run" / "recipe.yaml"
    assert recipe_hash(load_recipe(file)).startswith("0a634d8bcd3b")  # by the version before the keys
