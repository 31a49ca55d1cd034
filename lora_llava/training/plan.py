"""A recipe worked out: rows encoded, steps counted, everything that can fail before training has been tried."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, PreTrainedTokenizerBase

from lora_llava.data.captions import load_captions, split_rows
from lora_llava.data.conversation import Conversation
from lora_llava.data.images import FolderImages, ImageSource, Pictures, Pixels
from lora_llava.data.rows import Report, build_rows
from lora_llava.data.scienceqa import ScienceQASplit, load_scienceqa
from lora_llava.data.templates import Template, chat_template, get_template
from lora_llava.demo.dataset import build_demo_captions, build_demo_scienceqa
from lora_llava.errors import UserError
from lora_llava.model.adapters import lora_config, planned_parameters
from lora_llava.model.attention import resolve_attention
from lora_llava.model.base import build_processor, cache_folder, image_processor_of, load_tokenizer
from lora_llava.model.loading import check_bitsandbytes, resolve_dtype
from lora_llava.model.start import ModelPlan, plan_model
from lora_llava.recipe import Recipe
from lora_llava.training.memory import Step
from lora_llava.training.planner import build_step, choose_checkpointing, measure_rows
from lora_llava.training.rows import RowOrder, order_rows


@dataclass
class Split:
    """Rows of one split.

    Attributes:
        conversations: Those that are used.
        images: Opens their pictures.
        pictures: Gives them to a model.
        rows: The same, encoded.
        report: What became of them.
    """

    conversations: list[Conversation]
    images: ImageSource
    pictures: Pictures
    rows: list[dict[str, Any]]
    report: Report


@dataclass
class RunPlan:
    """Everything of a run but its weights.

    Attributes:
        recipe: What was asked for.
        model: The model's plan.
        tokenizer: With `<image>` and `<pad>`.
        processor: The stock processor that is exported.
        template: The conversation template, its system text replaced if the recipe says so.
        splits: `train`, and `validation` and `test` where the recipe has them.
        order: Which samples share a forward pass, and the optimiser steps.
        step: What the heaviest of them takes, and how much of it is recomputed.
        refusal: Why that cannot fit here; None where it does.
        trained_parameters: `lora` and `projector`.
    """

    recipe: Recipe
    model: ModelPlan
    tokenizer: PreTrainedTokenizerBase
    processor: Any
    template: Template
    splits: dict[str, Split]
    order: RowOrder
    step: Step
    refusal: UserError | None
    trained_parameters: dict[str, int]


Progress = Callable[[str, Iterable[Conversation]], Iterable[Conversation]]


def plan_run(recipe: Recipe, progress: Progress = lambda name, rows: rows) -> RunPlan:
    """Work a recipe out and load no weights.

    Args:
        recipe: The recipe.
        progress: Wraps the encoding of each split, for a progress bar.

    Returns:
        The plan.

    Raises:
        UserError: For anything that would make the run fail later, memory aside: that stands in `refusal`.
    """
    if recipe.model.quantization == "nf4":
        check_bitsandbytes()
    check_reporters(recipe.training.report_to)
    model = plan_model(recipe.model)
    template = get_template(recipe.data.template, recipe.data.system_prompt)
    tokenizer, processor = build_run_processor(recipe, model.config, model.tokenizer_folder, model.image_folder)
    _check_context(recipe, model.config)
    splits = {
        name: _encode_split(recipe, name, conversations, images, processor, model.config, progress)
        for name, (conversations, images) in read_splits(recipe).items()
    }
    samples = splits["train"].rows
    order = _order(recipe, samples)
    extremes = measure_rows(order.rows, samples, padded=not is_padding_free(recipe)[0])
    step, refusal = build_step(recipe, model.config, extremes, cuda=torch.cuda.is_available()), None
    try:
        step = choose_checkpointing(recipe, step)
    except UserError as error:
        refusal = error
    return RunPlan(
        recipe, model, tokenizer, processor, template, splits, order, step, refusal,
        planned_parameters(model.config, run_lora_config(recipe)),
    )  # fmt: skip


def _encode_split(
    recipe: Recipe, name: str, conversations: list[Conversation], images: ImageSource,
    processor: Any, config: LlavaConfig, progress: Progress,
) -> Split:  # fmt: skip
    rows, report = build_rows(
        conversations,
        tokenizer=processor.tokenizer,
        template=get_template(recipe.data.template, recipe.data.system_prompt),
        num_image_tokens=config.image_seq_length,
        # A test row is asked, not trained on: its answer need not fit.
        max_length=sys.maxsize if name == "test" else recipe.data.max_length,
        on_overlong=recipe.data.on_overlong,
        images=images,
        on_bad_image=recipe.data.on_bad_image,
        progress=lambda items: progress(name, items),
    )
    kept = {row["row_id"] for row in rows}
    used = [row for row in conversations if row.row_id in kept]
    return Split(used, images, Pixels(images, processor.image_processor), rows, report)


def build_run_processor(
    recipe: Recipe, config: LlavaConfig, tokenizer_folder: Path, image_folder: Path
) -> tuple[PreTrainedTokenizerBase, Any]:
    """The tokenizer that encodes rows and the stock processor that carries it, template included."""
    template = get_template(recipe.data.template, recipe.data.system_prompt)
    tokenizer = load_tokenizer(tokenizer_folder, config)
    image_processor = image_processor_of(image_folder, config, recipe.data.image_aspect)
    return tokenizer, build_processor(tokenizer, config, image_processor, chat_template(template))


def run_lora_config(recipe: Recipe, base: str | None = None) -> Any:
    """The PEFT config of a recipe; Stage 1 has no adapters."""
    if recipe.lora is None:
        return lora_config(base=base)
    return lora_config(**recipe.lora.model_dump(), base=base)


def read_splits(recipe: Recipe) -> dict[str, tuple[list[Conversation], ImageSource]]:
    """Read a recipe's splits; the test split only where an evaluation asks for it.

    Raises:
        UserError: For data that is missing or malformed, or a split that is empty.
    """
    data = recipe.data
    if data.format == "captions":
        file = build_demo_captions(cache_folder()) if data.path == "demo" else Path(data.path)
        rows = load_captions(file)
        images: ImageSource = FolderImages(Path(data.image_folder or file.parent / "images"), data.max_image_pixels)
        train, validation = split_rows(rows, data.validation_rows, recipe.seed)
        splits: dict[str, tuple[list[Conversation], ImageSource]] = {"train": (train, images)}
        if validation:
            splits["validation"] = (validation, images)
    else:
        splits = {name: _scienceqa_split(recipe, split) for name, split in _split_names(recipe).items()}
    if data.max_train_rows is not None:
        rows, images = splits["train"]
        chosen = random.Random(recipe.seed).sample(range(len(rows)), min(data.max_train_rows, len(rows)))
        splits["train"] = [rows[i] for i in sorted(chosen)], images
    return splits


def read_test_split(recipe: Recipe) -> ScienceQASplit:
    """Read the test split alone.

    Raises:
        UserError: Where the recipe has none, or its data is missing or malformed.
    """
    if recipe.data.format != "scienceqa" or recipe.data.splits.test is None:
        raise UserError("this recipe has no ScienceQA test split to ask; name one that has with --recipe")
    return _scienceqa_split(recipe, recipe.data.splits.test)


def _split_names(recipe: Recipe) -> dict[str, str]:
    splits = recipe.data.splits
    names = {"train": splits.train}
    if splits.validation is not None:
        names["validation"] = splits.validation
    if recipe.evaluation is not None:
        if splits.test is None:
            raise UserError("data.splits.test is null, but evaluation asks for it; name a split or drop evaluation")
        names["test"] = splits.test
    return names


def _scienceqa_split(recipe: Recipe, split: str) -> ScienceQASplit:
    data = recipe.data
    path = build_demo_scienceqa(cache_folder()) if data.path == "demo" else data.path
    return load_scienceqa(
        path, split, order=data.prompt_order, image_position=data.image_position, seed=recipe.seed,
        image_folder=data.image_folder, max_image_pixels=data.max_image_pixels, revision=data.revision,
    )  # fmt: skip


def _check_context(recipe: Recipe, config: LlavaConfig) -> None:
    positions = config.text_config.max_position_embeddings
    if recipe.data.max_length > positions:
        raise UserError(f"data.max_length is {recipe.data.max_length}, over the language model's {positions} positions")


def check_reporters(reporters: Iterable[str]) -> None:
    """Hold that what is to receive the curves is installed.

    Raises:
        UserError: Naming the one that is not.
    """
    import importlib.util

    for reporter in reporters:
        if importlib.util.find_spec(reporter) is None:
            raise UserError(f"training.report_to: {reporter} is not installed; pip install {reporter}, or leave it out")


def is_padding_free(recipe: Recipe) -> tuple[bool, str]:
    """Whether a recipe trains on rows without padding here, and on what, in words."""
    return resolve_attention(recipe.model.attention, resolve_dtype(recipe.model.dtype))


def _order(recipe: Recipe, rows: list[dict[str, Any]]) -> RowOrder:
    """Lay out the run.

    Raises:
        UserError: Where a sample is longer than a row, or rows cannot be packed here.
    """
    budget = recipe.training.max_tokens_per_row
    padding_free, found = is_padding_free(recipe)
    if budget is not None:
        if not padding_free:
            raise UserError(
                f"training.max_tokens_per_row needs rows without padding; this machine has {found}; set "
                "training.max_tokens_per_row=null training.batch_size=4"
            )
        longest = max(rows, key=lambda row: len(row["input_ids"]))
        if len(longest["input_ids"]) > budget:
            raise UserError(
                f"row {longest['row_id']} has {len(longest['input_ids'])} tokens, over training.max_tokens_per_row "
                f"{budget}; raise it, or set data.max_length={budget} with data.on_overlong=drop or truncate_answer"
            )
    lengths = [len(row["input_ids"]) for row in rows]
    return order_rows(recipe.training, lengths, seed=recipe.seed, padded=not padding_free)
