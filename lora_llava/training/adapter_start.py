"""Start the adapters of a run as its recipe says, before the first step; a resumed run has them in its checkpoint."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers.trainer_utils import set_seed

from lora_llava.core.errors import UserError
from lora_llava.model.adapter_file import read_lora_config
from lora_llava.model.adapters import adapter_tensors
from lora_llava.model.initialization import (
    EVA_BATCHES,
    EVA_POSITIONS,
    EVA_RHO,
    lora_layers,
    start_eva,
    start_loftq,
    start_orthogonal,
)
from lora_llava.model.start import Base
from lora_llava.model.weights.names import ADAPTER_FILE
from lora_llava.planning.run_plan import RunPlan
from lora_llava.recipe import Recipe
from lora_llava.runs.resume import Start
from lora_llava.training.feed import Feed


def start_adapters(plan: RunPlan, base: Base, model: PeftModel, feed: Feed) -> str | None:
    """Start the adapters, equally in every process.

    Args:
        plan: From `plan_run`.
        base: From `prepare_base`.
        model: The PEFT model, with the projector that it starts from.
        feed: The training rows.

    Returns:
        A line about it, or None for PEFT's default.

    Raises:
        UserError: If the data is too little for it.
    """
    lora = plan.recipe.lora
    if lora is None or lora.init == "default" or plan.recipe.model.start_from.run is not None:
        return None
    set_seed(plan.recipe.seed)
    if lora.init == "orthogonal":
        start_orthogonal(model)
        return "adapters start orthogonal"
    if lora.init == "loftq":
        start_loftq(model, base.folder)
        return "adapters start as a correction of NF4; merge them with --base nf4"
    start_eva(model, _drawn_batches(feed, plan.recipe.seed, round(EVA_POSITIONS * EVA_RHO * lora.r)))
    ranks = [layer.r[model.active_adapter] for layer in lora_layers(model).values()]
    return f"eva: {len(ranks)} layers have ranks from {min(ranks)} to {max(ranks)}, {sum(ranks)} in all"


def _drawn_batches(feed: Feed, seed: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Yield batches of training samples drawn by the seed, each of as many samples as have this many tokens.

    They are small, and the same for every number of processes and samples per pass.
    """
    order, batch, made = list(range(len(feed.samples))), [], 0
    random.Random(seed).shuffle(order)
    for index in order:
        batch.append(feed.samples[index])
        if sum(len(sample["input_ids"]) for sample in batch) >= tokens:
            yield feed.collator(batch)
            batch, made = [], made + 1
        if made == EVA_BATCHES:
            return


def saved_config(recipe: Recipe, start: Start | None) -> LoraConfig | None:
    """Return the PEFT config to resume or continue with; None if it is that of the recipe.

    Only EVA changes the config: it distributes the ranks.
    """
    run = recipe.model.start_from.run
    folder = start.checkpoint if start is not None else Path(run) if run is not None else None
    if folder is None or recipe.lora is None or recipe.lora.init != "eva":
        return None
    config = read_lora_config(folder)
    config.inference_mode = False
    config.lora_dropout = recipe.lora.dropout
    return config


def continue_adapter(model: PeftModel, recipe: Recipe) -> str | None:
    """Give a model the adapter and projector of the run that its recipe continues.

    Args:
        model: The PEFT model, with that run's settings.
        recipe: The recipe.

    Returns:
        A line about it; None if the recipe continues no run.

    Raises:
        UserError: If the file does not have exactly the model's trained tensors.
    """
    run = recipe.model.start_from.run
    if run is None:
        return None
    tensors = load_file(Path(run) / ADAPTER_FILE)
    expected = adapter_tensors(model)
    other = sorted(tensors.keys() ^ expected.keys())
    if other:
        raise UserError(f"model.start_from.run: {run} and the recipe train other tensors, such as {other[0]}")
    set_peft_model_state_dict(model, tensors)
    return f"continues {getattr(run, 'written', run)}: its adapter and projector, with a new optimizer and schedule"
