"""Small runs with a choice of what trains: the options, and the checks that every one of them passes."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console

from lora_llava.model.start import prepare_base
from lora_llava.planning.run_plan import RunPlan, plan_run
from lora_llava.publishing.merge import merge
from lora_llava.publishing.merge_source import read_source
from lora_llava.recipe import Recipe
from lora_llava.recipe.io import check_recipe
from lora_llava.training.adapter_start import start_adapters
from lora_llava.training.stages import build_feeds, build_trained_model, train
from tests.ends import act_at
from tests.training.small_runs import PulledPlugError, pull_plug, recipe_of, run, same, weights


def chosen(content: dict[str, Any], **choices: Any) -> dict[str, Any]:
    """Return a recipe's content with choices such as `lora={"init": "eva"}` added to its sections."""
    content = copy.deepcopy(content) | {"evaluation": None}
    for section, values in choices.items():
        content[section] = content[section] | values
    return content


def trained_model(content: dict[str, Any]) -> tuple[Recipe, RunPlan, PeftModel]:
    """Train a recipe in this process; return the recipe, the plan and the trained model."""
    recipe = check_recipe(content, "test")
    plan, base = plan_run(recipe), prepare_base(recipe.model, recipe.seed)
    Path(recipe.output_dir).mkdir()
    model = build_trained_model(recipe, base)
    start_adapters(plan, base, model, build_feeds(plan)[0])
    train(plan, base, model)
    return recipe, plan, model.eval()


@torch.no_grad()
def logits_of(model: Any, plan: RunPlan) -> torch.Tensor:
    """Return a model's logits of the first training row with an image."""
    split = plan.splits["train"]
    row = next(row for row in split.rows if row["image_files"])
    pixels = split.load_pixels(row["image_files"])
    ids = torch.tensor([row["input_ids"]])
    found: torch.Tensor = model.eval()(input_ids=ids, pixel_values=pixels, use_cache=False).logits
    return found


def resumes_to_the_bit(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Check that a run stopped after step 3 of 4 ends as one that was not stopped; return its weights."""
    recipe = recipe_of(content, max_steps=4, save_every=2, eval_every=4)
    run(recipe)
    expected = weights(Path(recipe.output_dir))
    with monkeypatch.context() as patch:
        act_at(3, pull_plug, patch.setattr)
        with pytest.raises(PulledPlugError):
            run(recipe, overwrite=True)
    run(recipe, resume=True)
    assert same(weights(Path(recipe.output_dir)), expected)
    return expected


def merges(run_folder: Path, output: Path, base: Any = "bf16") -> dict[str, Any]:
    """Merge a run in float32 and return the proof."""
    return merge(run_folder, output, base=base, dtype="float32", console=quiet())


def stock(run_folder: Path, loaded: Any) -> PeftModel:
    """Load a run with stock PEFT on a loaded base."""
    return PeftModel.from_pretrained(loaded, str(run_folder))


def base_of(run_folder: Path) -> Path:
    return read_source(run_folder).base


def quiet() -> Console:
    """Return a console that prints nothing."""
    return Console(file=io.StringIO())
