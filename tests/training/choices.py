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
from transformers import LlavaForConditionalGeneration

from lora_llava.model.fast_path.trained_loss import labelled_loss
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


def after_backward(recipe: Recipe) -> tuple[RunPlan, Any, Any]:
    """Return the plan, our model and the plain stock model of its base, with the gradients of one sample in both."""
    plan, base = plan_run(recipe), prepare_base(recipe.model, 0)
    ours = build_trained_model(recipe, base).train()
    plain = LlavaForConditionalGeneration.from_pretrained(base.folder, dtype="float32")  # B is zero
    feed = build_feeds(plan)[0]
    sample = next(feed.samples[i] for row in feed.rows for i in row if feed.samples[i]["image_files"])
    labelled_loss(ours, feed.collator([sample]))[0].backward()
    ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])
    pixels = plan.splits["train"].load_pixels(sample["image_files"])
    logits = plain(input_ids=ids, pixel_values=pixels, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").backward()
    return plan, ours, plain
