"""`lora-llava plan`: forecast a run's memory, steps and time within seconds, without images or weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table as RichTable
from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import Conversation
from lora_llava.data.images.image_check import image_size
from lora_llava.data.images.image_sources import SplitImages
from lora_llava.data.images.tiling import TiledImages
from lora_llava.data.selection import build_rows
from lora_llava.model.families.tower_families import image_tokens, tiling_of
from lora_llava.model.loading import check_machine, describe_dtype, resolve_dtype
from lora_llava.model.start import plan_model
from lora_llava.planning import plan_tables
from lora_llava.planning.continued_run import check_continued
from lora_llava.planning.fit import (
    Extremes,
    build_step,
    choose_checkpointing,
    measure_rows,
    what_fits,
)
from lora_llava.planning.memory import Step
from lora_llava.planning.memory_budget import describe_device
from lora_llava.planning.row_order import RowOrder, exact_epochs, order_rows
from lora_llava.planning.run_plan import build_run_processor, is_padding_free, run_lora_config
from lora_llava.planning.timing import published_hours, time_row
from lora_llava.recipe import Recipe
from lora_llava.splits.split_rows import sample_rows

_SAMPLES = 1_000
"""Conversations that are encoded to estimate the lengths of all."""
_ROWS = 20_000
"""Most conversations whose row order is computed; more are extrapolated."""


@dataclass(frozen=True)
class Forecast:
    """An estimate of a run from a sample of its data.

    Attributes:
        step: The step of the heaviest row, without recomputation.
        steps: Optimizer steps.
        tokens: Tokens of the run without padding; None without data.
        padding: Ratio of tokens with padding to those without.
        longest: Tokens of the longest sample; without data, the most that the recipe allows.
        source: Description of the sample.
    """

    step: Step
    steps: int | None
    tokens: int | None
    padding: float
    longest: int
    source: str


_OVERLONG = {
    "error": "finetune refuses them, and `lora-llava check` names them",
    "drop": "finetune drops them",
    "truncate_answer": "finetune cuts their answers",
}


def forecast(recipe: Recipe) -> Forecast:
    """Forecast a run from a sample of its data, or from its limits if the data is not available.

    Raises:
        UserError: If the model's config is not available, or a setting cannot run here.
    """
    check_machine(recipe.model.quantization, recipe.model.dtype)
    model = plan_model(recipe.model)
    check_continued(recipe)
    run_lora_config(recipe, model.config)  # refuses targets that the model does not have
    cuda = torch.cuda.is_available()
    try:
        drawn, images, total = sample_rows(recipe, "train", _SAMPLES)
    except UserError as error:
        step = build_step(recipe, model.config, _limits(recipe, model.config), cuda=cuda)
        return Forecast(
            step,
            recipe.training.max_steps,
            None,
            1.0,
            recipe.data.max_length,
            f"data not available ({error}): all rows assumed to be full",
        )
    tokenizer, _, template = build_run_processor(recipe, model)
    samples, report = build_rows(
        drawn,
        tokenizer=tokenizer,
        template=template,
        num_image_tokens=_tokens(model.config, drawn, images),
        max_length=recipe.data.max_length,
        on_overlong="drop",
    )
    source = f"lengths from {len(samples):,} of {total:,} samples; rows that share images need less"
    if report.dropped:
        source += (
            f"; {report.dropped.total():,} of the {len(drawn):,} read are over data.max_length "
            f"{recipe.data.max_length:,} and not counted: {_OVERLONG[recipe.data.on_overlong]}"
        )
    total = _rows_per_epoch(recipe, total)
    lengths = samples.lengths.tolist()
    padded = not is_padding_free(recipe, model.config)[0]
    order, scale = _order_sample(recipe, total, lengths, padded)
    tokens = int(scale * sum(lengths[i % len(lengths)] for row in order.rows for i in row))
    folded = [[i % len(samples) for i in row] for row in order.rows]
    extremes = measure_rows(folded, samples, padded=padded)
    if recipe.training.max_tokens_per_row is not None:
        extremes = replace(extremes, tokens=recipe.training.max_tokens_per_row)
    filled = sum(len(row) * max(lengths[i] for i in row) for row in folded) if padded else 0
    padding = max(1.0, filled / sum(lengths[i] for row in folded for i in row))
    step = build_step(recipe, model.config, extremes, cuda=cuda)
    return Forecast(step, round(scale * order.steps), tokens, padding, max(lengths), source)


def _rows_per_epoch(recipe: Recipe, total: int) -> int:
    """Return the rows per epoch, without held-out rows and rows that are not drawn."""
    data = recipe.data
    left = max(1, total - data.validation_rows - data.test_rows)
    chosen = [source.rows for source in data.train_sources() if source.rows is not None]
    if chosen and len(chosen) == len(data.train_sources()):
        return sum(chosen)
    return left if data.max_train_rows is None else min(left, data.max_train_rows)


def _order_sample(recipe: Recipe, total: int, sampled: list[int], padded: bool) -> tuple[RowOrder, float]:
    """Order one pass over data with the sample's lengths repeated; return it and the passes of the run."""
    count = min(total, _ROWS)
    lengths = [sampled[i % len(sampled)] for i in range(count)]
    training = recipe.training.model_copy(update={"epochs": 1.0, "max_steps": None})
    order = order_rows(training, lengths, seed=recipe.seed, padded=padded)
    passes = float(exact_epochs(recipe.training) * total / count)
    if recipe.training.max_steps is not None:
        passes = recipe.training.max_steps / order.steps
    return order, passes


def _limits(recipe: Recipe, config: LlavaConfig) -> Extremes:
    training = recipe.training
    tokens = training.max_tokens_per_row or training.batch_size * recipe.data.max_length
    tiling = tiling_of(config)
    if tiling is None:
        return Extremes(tokens, tokens // 2, max(1, tokens // (image_tokens(config) + 100)))
    largest = max(tiling.grid, key=tiling.tokens)
    images = max(1, tokens // (tiling.tokens(largest) + 100))
    return Extremes(tokens, tokens // 2, images * tiling.tiles(largest))


def _tokens(config: LlavaConfig, rows: Sequence[Conversation], images: SplitImages) -> int | TiledImages:
    """Return the tokens of an image; for a model with tiles by the sizes of the rows' images, read from their heads."""
    tiling = tiling_of(config)
    if tiling is None:
        return image_tokens(config)
    names = dict.fromkeys(name for row in rows for name in row.images)
    return TiledImages(tiling, {name: image_size(images, name) for name in names})


def print_forecast(recipe: Recipe, console: Console) -> None:
    """Print a run's memory, the GPUs it fits, its steps and its time.

    Raises:
        UserError: See `forecast`; or if the run does not fit here.
    """
    found = forecast(recipe)
    console.print(describe_device())
    if line := describe_dtype(resolve_dtype(recipe.model.dtype)):
        console.print(line, soft_wrap=True)
    try:
        step, refusal = choose_checkpointing(recipe, found.step), None
    except UserError as error:
        step, refusal = found.step, error
    plan_tables.print_memory(recipe, step, found.longest, console)
    cards = RichTable(title="Cards", title_justify="left")
    cards.add_column("card", justify="right")
    cards.add_column("settings with which this recipe fits, computed")
    for size, text in what_fits(recipe, found.step):
        cards.add_row(f"{size} GB", text)
    console.print(cards)
    start = recipe.model.start_from.stage1_recipe
    if start is not None:
        console.print(f"Stage 1, {start}, runs first where its result is not there; it has a plan of its own")
    _print_time(recipe, found, None if refusal else step, console)
    if refusal is not None:
        raise refusal


def _print_time(recipe: Recipe, found: Forecast, step: Step | None, console: Console) -> None:
    console.print(found.source, soft_wrap=True)
    if found.tokens is None or not found.steps:
        console.print("time: not known without the data")
        return
    console.print(
        f"{found.steps:,} steps, {found.tokens:,} tokens, {found.tokens / found.steps:,.0f} tokens per step on average"
    )
    seconds = time_row(recipe, step) if step is not None else None
    if step is not None and seconds is not None:
        rate = step.tokens / seconds / found.padding
        console.print(
            f"time: about {_duration(found.tokens / rate)} of training at {rate:,.0f} tokens/s, timed here on random "
            "weights; loading, images, validation and evaluation are not included"
        )
        return
    hours = published_hours(found.step, found.tokens)
    known = ", ".join(f"{_duration(3600 * value)} on an {card}" for card, value in hours.items())
    console.print(
        f"time: about {known}: published rates of Llama-2-7B QLoRA (fsdp_qlora), scaled by size; not measured here"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
