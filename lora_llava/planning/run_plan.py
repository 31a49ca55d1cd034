"""Plan a run: encode rows, count steps, and check everything that can fail before training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import LlavaConfig, PreTrainedTokenizerBase

from lora_llava.core.errors import UserError
from lora_llava.data.packed_rows.shared_prefixes import SharedPrefixes, find_prefixes
from lora_llava.data.selection import tiles_advice
from lora_llava.data.templates.chat_template import saved_text
from lora_llava.data.templates.named_templates import chat_template
from lora_llava.data.templates.resolve_template import resolve_template
from lora_llava.data.templates.spans import AnyTemplate
from lora_llava.distributed.ranks import this_rank
from lora_llava.distributed.sharding import check_sharding, is_sharded, shard_by_layer
from lora_llava.model.adapters import NEWLINE, lora_config, planned_parameters
from lora_llava.model.base import build_processor
from lora_llava.model.families.decoder_shape import decoder_shape
from lora_llava.model.families.tower_families import image_processor_of, saved_image_processor, tiling_of
from lora_llava.model.fast_path.attention import resolve_attention
from lora_llava.model.loading import check_machine, resolve_dtype
from lora_llava.model.new_tokens import add_new_tokens
from lora_llava.model.start import ModelPlan, plan_model
from lora_llava.model.tokenizer import load_tokenizer
from lora_llava.model.vision_adapters import vision_adapters
from lora_llava.planning.continued_run import check_continued, check_continued_processor
from lora_llava.planning.fit import build_step, choose_checkpointing, measure_rows, resolve_optimizer
from lora_llava.planning.memory import Step
from lora_llava.planning.row_order import RowOrder, order_rows
from lora_llava.planning.tiled_run import check_tiled
from lora_llava.recipe import EvaluationSection, Recipe
from lora_llava.splits.earlier_rows import earlier_rows
from lora_llava.splits.encoded_sources import Progress, encode_splits, no_progress
from lora_llava.splits.refusals import refuse_errors
from lora_llava.splits.seen_rows import SeenRows, seen_of
from lora_llava.splits.split_rows import Split, build_split


class Computation(NamedTuple):
    """How a run computes on this machine.

    Attributes:
        dtype: The dtype of frozen weights and activations.
        padding_free: Whether samples are packed instead of padded.
        attention: A description of the attention.
        optimizer: The optimizer, by its name in transformers.
    """

    dtype: torch.dtype
    padding_free: bool
    attention: str
    optimizer: str


@dataclass
class RunPlan:
    """A run without its weights.

    Attributes:
        recipe: The recipe.
        model: The model's plan.
        tokenizer: The tokenizer, with `<image>` and `<pad>`.
        processor: The stock processor, saved with the run.
        template: The conversation template, with the system text of the recipe.
        splits: `train`, and `validation` and `test` if the recipe has them.
        order: The samples of each forward pass, and the optimizer steps.
        step: The heaviest step, and how much of it is recomputed.
        refusal: The error if it does not fit here; else None.
        trained_parameters: `lora` and `projector`.
        computation: Dtype, attention and optimizer of the run on this machine.
        seen: The rows of all splits by content, for a run that continues this one.
        earlier: The rows of the runs that this one continues; None if it continues none.
        notes: Lines about rows whose side is that of an earlier run.
        sharing: Lines about rows that share images.
    """

    recipe: Recipe
    model: ModelPlan
    tokenizer: PreTrainedTokenizerBase
    processor: Any
    template: AnyTemplate
    splits: dict[str, Split]
    order: RowOrder
    step: Step
    refusal: UserError | None
    trained_parameters: dict[str, int]
    computation: Computation
    seen: SeenRows = field(default_factory=SeenRows)
    earlier: SeenRows | None = None
    notes: tuple[str, ...] = ()
    sharing: tuple[str, ...] = ()


def plan_run(recipe: Recipe, progress: Progress = no_progress) -> RunPlan:
    """Plan a run without loading weights.

    Args:
        recipe: The recipe.
        progress: Wraps the encoding of each source and the opening of images, for a progress bar.

    Returns:
        The plan.

    Raises:
        UserError: For anything that would make the run fail later, except memory, which is in `refusal`.
    """
    check_machine(recipe.model.quantization, recipe.model.dtype)
    check_reporters(recipe.training.report_to)
    check_launch(recipe)
    model = plan_model(recipe.model)
    check_continued(recipe)
    tokenizer, processor, template = build_run_processor(recipe, model)
    check_continued_processor(recipe, processor)
    lora = run_lora_config(recipe, model.config, token_ids=_new_ids(recipe, tokenizer))
    _check_tying(recipe, model.config)
    if is_sharded():
        shard_by_layer(decoder_shape(model.config.text_config).layer_classes)
    _check_context(recipe, model.config)
    earlier = earlier_rows(recipe, processor, template, model.config, progress)
    opened = encode_splits(_with_test_rows(recipe), tokenizer, template, progress, seen=earlier)
    splits = {
        name: build_split(recipe, name, split, processor, model.config, progress) for name, split in opened.items()
    }
    refuse_errors(recipe, opened)
    seen = seen_of(splits)
    if recipe.evaluation is None and recipe.data.test_source is None:
        splits.pop("test", None)
    samples = splits["train"].rows
    padded = not is_padding_free(recipe, model.config)[0]
    prefixes = None if padded else prefixes_of(recipe, splits["train"])
    order = order_run(recipe, splits["train"], model.config, prefixes)
    extremes = measure_rows(order.rows, samples, padded=padded, shared=order.shared)
    step, refusal = build_step(recipe, model.config, extremes, cuda=torch.cuda.is_available()), None
    try:
        step = choose_checkpointing(recipe, step)
    except UserError as error:
        refusal = error
    return RunPlan(
        recipe,
        model,
        tokenizer,
        processor,
        template,
        splits,
        order,
        step,
        refusal,
        planned_parameters(model.config, lora),
        resolve_computation(recipe, model.config),
        seen,
        earlier,
        opened["train"].notes,
        tuple(_sharing(order, prefixes, samples.lengths.tolist())),
    )


def resolve_computation(recipe: Recipe, config: LlavaConfig) -> Computation:
    """Resolve every `auto` of a recipe's computation on this machine."""
    padding_free, attention = is_padding_free(recipe, config)
    optimizer = resolve_optimizer(recipe, cuda=torch.cuda.is_available())
    return Computation(resolve_dtype(recipe.model.dtype), padding_free, attention, optimizer)


def _with_test_rows(recipe: Recipe) -> Recipe:
    """Return the recipe as `check` reads it, with held-out test rows even if they are not evaluated."""
    if not recipe.data.test_rows:
        return recipe
    return recipe.model_copy(update={"evaluation": recipe.evaluation or EvaluationSection()})


def check_launch(recipe: Recipe) -> None:
    """Refuse distributed setups that are not known to match one process.

    Args:
        recipe: The recipe.

    Raises:
        UserError: For DeepSpeed and for some ways of FSDP, set by `accelerate launch` in the environment.
    """
    if is_sharded():
        check_sharding(recipe, this_rank()[1])
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        use = "start with torchrun, or with accelerate launch --multi_gpu, which load the complete model on every GPU"
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        if stage == "3" and recipe.model.quantization == "nf4":
            raise UserError(f"DeepSpeed's ZeRO-3 shards weights, which 4-bit weights do not support; {use}")
        raise UserError(f"DeepSpeed has not been tested with this trainer; {use}")


def build_run_processor(
    recipe: Recipe, model: ModelPlan, *, trained: bool = False
) -> tuple[PreTrainedTokenizerBase, Any, AnyTemplate]:
    """Return the tokenizer that encodes rows, the stock processor with it and the template, and the template.

    Args:
        recipe: The recipe.
        model: The plan of the model.
        trained: Whether the model may be one that the recipe made, whose tokenizer knows the new tokens.

    Raises:
        UserError: If a tokenizer or template does not fit.
    """
    tokenizer = load_tokenizer(model.tokenizer_folder, model.config)
    known = trained or recipe.model.start_from.run is not None
    add_new_tokens(tokenizer, recipe.model.new_tokens, model.config, known=known)
    captions = recipe.stage == 1 and recipe.data.format == "captions"
    template = resolve_template(
        "plain" if captions else recipe.data.template,
        recipe.data.system_prompt,
        tokenizer,
        saved_text(model.tokenizer_folder),
        model.config.text_config.model_type,
    )
    check_tiled(recipe, model.config)
    tiled = tiling_of(model.config) is not None and recipe.model.high_resolution is None
    if tiled or (recipe.data.image_aspect == "auto" and recipe.model.start_from.llava is not None):
        image_processor = saved_image_processor(model.image_folder, model.config)
    else:  # the tower's own settings are not those of a LLaVA: CLIP's crop loses the edges
        aspect = "crop" if recipe.data.image_aspect == "crop" else "pad"
        image_processor = image_processor_of(model.image_folder, model.config, aspect)
    return tokenizer, build_processor(tokenizer, model.config, image_processor, chat_template(template)), template


def _new_ids(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in recipe.model.new_tokens]


def run_lora_config(recipe: Recipe, config: LlavaConfig, base: str | None = None, token_ids: Sequence[int] = ()) -> Any:
    """Return the PEFT config of a recipe; Stage 1 has no adapters.

    Args:
        recipe: The recipe.
        config: Configuration of the LLaVA.
        base: Value of `base_model_name_or_path`.
        token_ids: Ids of `model.new_tokens`.

    Raises:
        UserError: If `lora.targets` names a layer that the language model does not have.
    """
    newline = () if recipe.model.high_resolution is None else (NEWLINE,)  # a published LLaVA-1.6 keeps its own
    if recipe.lora is None:
        return lora_config(base=base, modules_to_save=newline)
    shape = decoder_shape(config.text_config)
    targets = shape.check_targets(recipe.lora.targets, config.text_config.model_type)
    section = recipe.lora.model_dump(exclude={"vision", "init", "targets"})
    section["modules_to_save"] += newline
    vision = vision_adapters(recipe.lora.vision.model_dump(), config) if recipe.lora.vision else None
    pattern = shape.pattern(targets)
    return lora_config(**section, targets=targets, pattern=pattern, vision=vision, token_ids=token_ids, base=base)


def _check_context(recipe: Recipe, config: LlavaConfig) -> None:
    positions = getattr(config.text_config, "max_position_embeddings", None)
    if positions is not None and recipe.data.max_length > positions:
        raise UserError(f"data.max_length is {recipe.data.max_length}, over the language model's {positions} positions")


def _check_tying(recipe: Recipe, config: LlavaConfig) -> None:
    """Refuse to train embeddings or head in full if they are one matrix: as two, a stock model would tie them again."""
    tied = config.tie_word_embeddings or config.text_config.tie_word_embeddings
    if tied and recipe.lora is not None and recipe.lora.modules_to_save:
        raise UserError(
            f"lora.modules_to_save names {', '.join(recipe.lora.modules_to_save)}, but this model's embeddings and "
            "head are one matrix, which PEFT would save as two; leave it out, or train single rows by model.new_tokens"
        )


def check_reporters(reporters: Iterable[str]) -> None:
    """Check that the packages for logging are installed.

    Raises:
        UserError: Naming the first that is missing.
    """
    import importlib.util

    for reporter in reporters:
        if importlib.util.find_spec(reporter) is None:
            raise UserError(f"training.report_to: {reporter} is not installed; pip install {reporter}, or leave it out")


def is_padding_free(recipe: Recipe, config: LlavaConfig) -> tuple[bool, str]:
    """Return whether a recipe trains without padding on this machine, and a description of the attention."""
    return resolve_attention(recipe.model.attention, resolve_dtype(recipe.model.dtype), config.text_config)


def order_run(recipe: Recipe, split: Split, config: LlavaConfig, shared: SharedPrefixes | None = None) -> RowOrder:
    """Order the rows of a run: which training samples share a forward pass.

    Args:
        recipe: The recipe.
        split: The training split.
        config: Configuration of the LLaVA.
        shared: The prefixes that rows share; None shares none.

    Returns:
        The order.

    Raises:
        UserError: If a sample is longer than a row, or rows cannot be packed on this machine.
    """
    budget = recipe.training.max_tokens_per_row
    padding_free, found = is_padding_free(recipe, config)
    lengths = split.rows.lengths.tolist()
    if budget is not None:
        if not padding_free:
            raise UserError(
                f"training.max_tokens_per_row needs rows without padding; this machine has {found}; set "
                "training.max_tokens_per_row=null training.batch_size=4"
            )
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[longest] > budget:
            raise UserError(
                f"{split.rows.row_name(longest)} has {lengths[longest]} tokens, over training.max_tokens_per_row "
                f"{budget}; raise it, or set data.max_length={budget} with data.on_overlong=drop or truncate_answer"
                f"{tiles_advice(*split.rows.table_row(longest), budget)}"
            )
    return order_rows(
        recipe.training,
        lengths,
        seed=recipe.seed,
        padded=not padding_free,
        epochs=split.epochs,
        ranks=this_rank()[1],
        shared=shared,
    )


def prefixes_of(recipe: Recipe, split: Split) -> SharedPrefixes | None:
    """Return the prefixes that rows of a split share; None if `training.share_images` is off."""
    return None if recipe.training.share_images == "off" else find_prefixes(split.rows, split.pixels)


def _sharing(order: RowOrder, prefixes: SharedPrefixes | None, lengths: Sequence[int]) -> Iterator[str]:
    """Yield what rows that share images save, and how many cannot."""
    if order.shared is not None:
        computed = sum(order.shared.tokens(row, lengths) for row in order.rows)
        every = sum(lengths[i] for row in order.rows for i in row)
        yield (
            f"{order.shared.rows():,} of {len(lengths):,} rows share their image with other rows, and it is computed "
            f"once in a forward pass: {computed:,} tokens in the run instead of {every:,}"
        )
    if prefixes is not None and prefixes.other_text:
        yield (
            f"{prefixes.other_text:,} rows have the image of another row, but another text before it, and compute it "
            "again"
        )
