"""Train one stage: build the model and the trainer, train, and write the run directory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from transformers import PrinterCallback
from transformers.trainer_utils import set_seed

from lora_llava.core.device import is_out_of_memory
from lora_llava.core.errors import StoppedError, UserError
from lora_llava.data.collator import PackedCollator, PaddedCollator
from lora_llava.data.packed_rows.shared_prefixes import SharedPrefixes, SharedSamples
from lora_llava.distributed.ranks import first_alone, gather, is_first, this_rank
from lora_llava.distributed.sharding import describe_shard, full_weights, is_sharded, require_input_gradients
from lora_llava.evaluation.scoring import ScoreValidation
from lora_llava.model.adapters import add_adapters, freeze_plan, load_projector
from lora_llava.model.families.image_counts import limit_tiles
from lora_llava.model.fast_path.activation_checkpointing import checkpoint_language_model
from lora_llava.model.fast_path.attention import use_flash_varlen
from lora_llava.model.fast_path.host_weights import keep_in_host_memory
from lora_llava.model.fast_path.lean import make_lean
from lora_llava.model.loading import load_base
from lora_llava.model.new_tokens import new_token_ids
from lora_llava.model.start import Base
from lora_llava.model.vision import run_tower
from lora_llava.planning.memory import GIB
from lora_llava.planning.row_order import validation_rows
from lora_llava.planning.run_plan import RunPlan, is_padding_free, prefixes_of, run_lora_config
from lora_llava.recipe import Recipe, recipe_hash
from lora_llava.runs.checkpoint import DiskFullError
from lora_llava.runs.directory import save_model, versions
from lora_llava.runs.identity import run_identity
from lora_llava.runs.resume import Start
from lora_llava.splits.split_rows import Split
from lora_llava.training.callbacks import RefuseNaN, SaveEvery, StopEarly, StopOnSignal, WarnOfSpikes
from lora_llava.training.feed import Feed
from lora_llava.training.kernel_check import choose_kernels
from lora_llava.training.parameter_groups import Rates
from lora_llava.training.start_check import check_first_batch
from lora_llava.training.trainer import LlavaSFTTrainer
from lora_llava.training.trainer_arguments import training_arguments, warmup_steps
from lora_llava.training.training_progress import ProgressLine, peak_memory_bytes, peak_reserved_bytes

CURVES = ("learning_rate", "tokens_per_second", "memory_bytes", "validation_score")
"""Values that are logged besides the losses."""


@dataclass(frozen=True)
class TrainResult:
    """The result of training.

    Attributes:
        seconds: Wall time of the training loop, without validation, evaluation and saving.
        tokens: Tokens trained on, without padding.
        supervised_tokens: Tokens with a label.
        peak_memory_bytes: Peak memory of the GPU in training, or else of the process.
        peak_reserved_bytes: Peak memory that torch took from the GPU, free blocks included; None without a GPU.
        best_validation_loss: Of the checkpoint kept; None without validation.
        steps: Optimizer steps, with those that were skipped.
        overflows: Steps that loss scaling skipped, as their gradients were too large for float16.
        planned_steps: Optimizer steps of the plan; more than `steps` if the run was stopped early.
        kept_step: Step of the checkpoint kept: the one with the lowest validation loss, else the last.
        stopped_early: Why the run was stopped early; None if it was not.
        loss_curve: `train` and `validation`: pairs of step and loss.
        curves: Pairs of step and value by name: `learning_rate`, `tokens_per_second`, `memory_bytes`,
            `validation_score`.
    """

    seconds: float
    tokens: int
    supervised_tokens: int
    peak_memory_bytes: int
    peak_reserved_bytes: int | None
    best_validation_loss: float | None
    steps: int
    overflows: list[int]
    planned_steps: int
    kept_step: int
    stopped_early: str | None
    loss_curve: dict[str, list[tuple[int, float]]]
    curves: dict[str, list[tuple[int, float]]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def build_trained_model(recipe: Recipe, base: Base, saved: LoraConfig | None = None, host_layers: int = 0) -> PeftModel:
    """Load the base and add the adapters of a recipe.

    Args:
        recipe: The recipe.
        base: From `prepare_base`.
        saved: The PEFT config of the checkpoint to resume from, which has the ranks; None makes that of the recipe.
        host_layers: Number of layers whose 4-bit weights are kept in host memory.

    Returns:
        The PEFT model, with the projector of Stage 1 if the base has one.
    """
    set_seed(recipe.seed)
    model = load_base(
        base.name,
        quantization=recipe.model.quantization,
        dtype=recipe.model.dtype,
        revision=base.revision,
        with_tower=recipe.training.vision_cache == "off",
        to_shard=is_sharded(),
    )
    limit_tiles(model.config, recipe.model.max_tiles)
    keep_in_host_memory(model.model.language_model, host_layers)
    if is_padding_free(recipe, model.config)[0]:
        use_flash_varlen(model)
    ids = new_token_ids(base.folder, recipe.model.new_tokens, model.config)
    config = saved or run_lora_config(recipe, model.config, base.name, ids)
    peft_model = add_adapters(model, config, recipe.training.projector_dropout)
    if recipe.training.vision_cache == "off":
        run_tower(model, trained=recipe.lora is not None and recipe.lora.vision is not None)
    make_lean(model.model.language_model)
    if is_sharded():
        require_input_gradients(model)
    if base.initial_projector is not None:
        load_projector(peft_model, base.initial_projector)
    return peft_model


def build_feeds(plan: RunPlan) -> tuple[Feed, Feed | None]:
    """Return the feeds of the training and the validation split."""
    padding_free = plan.computation.padding_free

    def feed(split: Split, rows: list[list[int]], shared: SharedPrefixes | None) -> Feed:
        collator: Any = PackedCollator(split.load_pixels) if padding_free else padded_collator(plan, split)
        return Feed(split.rows if shared is None else SharedSamples(split.rows, shared), rows, collator)

    train = feed(plan.splits["train"], plan.order.rows, plan.order.shared)
    validation = plan.splits.get("validation")
    if validation is None:
        return train, None
    training, lengths = plan.recipe.training, validation.rows.lengths.tolist()
    shared = prefixes_of(plan.recipe, validation) if padding_free else None
    order = validation_rows(training, lengths, shared=shared, ranks=this_rank()[1], padded=not padding_free)
    return train, feed(validation, order, shared)


def padded_collator(plan: RunPlan, split: Split) -> PaddedCollator:
    """Return the padding collator of a split, which is the reference."""
    return PaddedCollator(split.load_pixels, plan.tokenizer.pad_token_id)  # type: ignore[arg-type]


def train(
    plan: RunPlan, base: Base, model: PeftModel, start: Start | None = None, identity: dict[str, Any] | None = None
) -> TrainResult:
    """Train one stage and write its run directory.

    Args:
        plan: From `plan_run`.
        base: From `prepare_base`.
        model: From `build_trained_model`; trained in place, with the best checkpoint's weights afterwards.
        start: The checkpoint to resume from; None starts from the beginning.
        identity: The run's identity, from `run_identity` or `same_run`, saved with every checkpoint; None computes it.

    Returns:
        The result.

    Raises:
        StoppedError: After Ctrl-C, SIGTERM or SIGHUP, with a checkpoint written.
        PoisonedError: For a loss or gradient that is not a number.
        UserError: If memory or the disk is full, or an image is missing.
    """
    recipe = plan.recipe
    feed, validation = build_feeds(plan)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # of the answers before training, and of an earlier stage
    checkpoint_language_model(model.get_base_model(), plan.step.checkpointed, plan.step.offloaded)
    if not is_sharded():
        _check_start(plan, model, feed)
    trainer, stop, spikes = build_trainer(plan, model, feed, validation)
    trainer.identity = identity or run_identity(plan, base)
    trainer.identity["run"] = gather(trainer.identity["run"])[0]  # each rank has drawn a name; use the first
    if is_sharded():  # the weights are sharded only then
        trainer.on_begin = lambda: _begin_sharded(plan, model, feed)
    with stop.listening():
        run_trainer(trainer, start, lambda: _out_of_memory(plan))
    if stop.number is not None:
        raise StoppedError(
            f"stopped at step {trainer.state.global_step} of {plan.order.steps}; a checkpoint is in "
            f"{trainer.args.output_dir}; resume with the same command and --resume",
            stop.number,
        )
    if spikes.steps and is_first():
        print(f"the loss spiked at {len(spikes.steps)} logged steps: {', '.join(map(str, spikes.steps[:10]))}")
    if trainer.overflows and is_first():
        print(
            f"float16: loss scaling skipped {len(trainer.overflows)} of {trainer.state.global_step} steps, whose "
            f"gradients were too large: {', '.join(map(str, trainer.overflows[:10]))}"
        )
    seconds = trainer.seconds
    weights = full_weights(model)
    first_alone(lambda: save_model(Path(recipe.output_dir), model, plan, base, weights))
    trainer.join_tokens()
    return TrainResult(
        seconds,
        *trainer.tokens_of_all,
        peak_memory_bytes(),
        peak_reserved_bytes(),
        trainer.state.best_metric,
        trainer.state.global_step,
        trainer.overflows,
        plan.order.steps,
        trainer.state.best_global_step or trainer.state.global_step,
        next((each.reason for each in trainer.callback_handler.callbacks if isinstance(each, StopEarly)), None),
        _curves(trainer.state.log_history, {"train": "loss", "validation": "eval_loss"}),
        _curves(trainer.state.log_history, {name: name for name in CURVES}),
    )


def _begin_sharded(plan: RunPlan, model: PeftModel, feed: Feed) -> None:
    if is_first():
        print(describe_shard(model))
    _check_start(plan, model, feed)


def _check_start(plan: RunPlan, model: PeftModel, feed: Feed) -> None:
    """Compare the first rows padded and packed, and with Liger's kernels; ranks with sharded weights run the same."""
    split = plan.splits["train"]
    rank = 0 if is_sharded() else this_rank()[0]
    shared = plan.order.shared
    own = [row for row in feed.rows[rank :: 1 if is_sharded() else this_rank()[1]] if row] or feed.rows[:1]
    # Check a row in which samples share a prefix, if there is one.
    chosen = next((row for row in own if shared is not None and len(shared.runs(row)) < len(row)), own[0])
    samples = [feed.samples[i] for i in chosen]
    lines: list[str | None] = []
    if plan.computation.padding_free:
        lines.append(check_first_batch(model, samples, padded_collator(plan, split), feed.collator))
    if not is_sharded():
        lines.append(choose_kernels(model, samples, feed.collator))
    if is_first():
        print(*filter(None, lines), sep="\n", end="\n" if any(lines) else "")


def build_trainer(
    plan: RunPlan, model: PeftModel, feed: Feed, validation: Feed | None
) -> tuple[LlavaSFTTrainer, StopOnSignal, WarnOfSpikes]:
    """Build the trainer of a stage, with its callbacks."""
    recipe, split = plan.recipe, plan.splits["train"]
    line, stop, spikes = ProgressLine(f"stage {recipe.stage}"), StopOnSignal(), WarnOfSpikes()
    scored = recipe.evaluation is not None and recipe.evaluation.generate_every is not None
    scoring = [ScoreValidation(plan)] if scored else []
    early = recipe.training.early_stopping
    stopping = [StopEarly(early.patience, early.min_delta)] if early is not None else []
    rank, ranks = this_rank()
    own = feed.rows[rank::ranks]
    nan = RefuseNaN(lambda number: [split.name_of(i) for i in own[number]], plan.order.accumulation)
    every = recipe.training.save_every
    minutes = float(every.removesuffix("min")) if isinstance(every, str) else None
    saving = SaveEvery(every if isinstance(every, int) else None, minutes, time.monotonic)
    share, steps = recipe.training.warmup_ratio, plan.order.steps
    if is_first() and warmup_steps(share, steps) < math.ceil(share * steps):
        print(f"of {steps} steps {warmup_steps(share, steps)} are warm-up: more would leave too few to train")
    trainer = LlavaSFTTrainer(
        model,
        training_arguments(recipe, plan.order.steps, validation is not None, plan.order.accumulation),
        train=feed,
        validation=validation,
        processor=plan.processor,
        rates=learning_rates(recipe),
        callbacks=[*([line, spikes] if is_first() else []), stop, nan, saving, *stopping, *scoring],
    )
    trainer.remove_callback(PrinterCallback)  # the progress line replaces it
    trainer.on_loss, trainer.overflows = nan.losses.append, nan.overflows
    trainer.manifest_entries = {"recipe_hash": recipe_hash(recipe), "versions": versions()}
    line.trainer = trainer
    for callback in scoring:
        callback.trainer = trainer
    return trainer, stop, spikes


def learning_rates(recipe: Recipe) -> Rates:
    """Return the peak learning rates of a recipe."""
    training = recipe.training
    vision = recipe.lora.vision if recipe.lora else None
    return Rates(
        adapters=training.learning_rate,
        projector=training.projector_learning_rate or training.learning_rate,
        vision=vision.learning_rate if vision else None,
        loraplus_ratio=training.loraplus_ratio,
    )


def run_trainer(trainer: LlavaSFTTrainer, start: Start | None, out_of_memory: Callable[[], UserError]) -> None:
    """Train, and write a checkpoint of the last complete step if that fails.

    Args:
        trainer: From `build_trainer`.
        start: The checkpoint to resume from; None starts from the beginning.
        out_of_memory: Makes the error for full memory.

    Raises:
        ReportedError: For a failure that the user can fix.
    """
    trainer.changed = start.changed if start else ()
    try:
        trainer.train(resume_from_checkpoint=str(start.checkpoint) if start else None)
    except UserError as error:
        save = not isinstance(error, DiskFullError)
        raise type(error)(f"{error}{trainer.save_last_step(save)}") from None
    except SafetensorError as error:
        where = start.checkpoint if start else trainer.args.output_dir
        raise UserError(f"{where}: weights cannot be read or written ({error})") from None
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise UserError(f"{out_of_memory()}{trainer.save_last_step()}") from None
        reason = " ".join(str(error).split())
        if "DataLoader worker" in reason:
            what = f"a process that loads images was killed ({reason:.200})"
        elif "deterministic" in reason and torch.are_deterministic_algorithms_enabled():
            what = f"training.deterministic: this step needs an operation without it ({reason:.200}); set it to false"
        else:
            raise
        raise UserError(f"{what}{trainer.save_last_step()}") from None


def _out_of_memory(plan: RunPlan) -> UserError:
    """Return the error for a plan that needed more memory than expected."""
    memory = "the GPU's memory" if torch.cuda.is_available() else "the memory"
    return UserError(
        f"{memory} ran out at a step planned at {plan.step.peak / GIB:.1f} GiB; set training.memory_gb="
        f"{0.9 * plan.step.peak / GIB:.1f}, so that more is recomputed"
    )


def _curves(history: list[dict[str, Any]], kinds: dict[str, str]) -> dict[str, list[tuple[int, float]]]:
    return {kind: [(entry["step"], entry[key]) for entry in history if key in entry] for kind, key in kinds.items()}


def describe_plan(model: PeftModel) -> list[dict[str, Any]]:
    """Return the freeze plan as dictionaries, for `metrics.json` and the terminal."""
    return [asdict(row) for row in freeze_plan(model)]
