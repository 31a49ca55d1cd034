"""TRL's training arguments for a recipe."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from trl import SFTConfig

from lora_llava.model.loading import resolve_dtype
from lora_llava.planning.fit import resolve_optimizer
from lora_llava.recipe import Recipe
from lora_llava.runs.check_run import CHECKPOINTS

_FEW = 4
"""Runs with fewer steps skip a warm-up of less than a step, as its first step has a learning rate of 0."""


def warmup_steps(share: float, steps: int) -> int:
    """Return the number of warm-up steps, as transformers counts them, but never all steps of a run.

    Args:
        share: The recipe's `training.warmup_ratio`.
        steps: Optimizer steps of the run.

    Returns:
        The share of the steps, rounded up; at most all steps but one, as the first has a learning rate of 0. It is 0 in
        a run of up to three steps if the share is less than a step.
    """
    if steps < _FEW and share * steps < 1:
        return 0
    return min(math.ceil(steps * share), steps - 1)


def training_arguments(recipe: Recipe, plan_steps: int, has_validation: bool, accumulation: int) -> SFTConfig:
    """Return TRL's training arguments for a recipe.

    Args:
        recipe: The recipe.
        plan_steps: Optimizer steps.
        has_validation: Whether there is a validation split.
        accumulation: Forward passes of an optimizer step.
    """
    training = recipe.training
    folder, dtype = Path(recipe.output_dir), resolve_dtype(recipe.model.dtype)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "logs")
    every = min(training.eval_every or plan_steps, plan_steps)
    args = SFTConfig(
        output_dir=str(folder / CHECKPOINTS),
        seed=recipe.seed,
        max_steps=plan_steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        warmup_steps=warmup_steps(training.warmup_ratio, plan_steps),
        lr_scheduler_type=training.lr_scheduler,
        optim=resolve_optimizer(recipe, cuda=torch.cuda.is_available()),
        max_grad_norm=training.max_grad_norm,
        eval_strategy="steps" if has_validation else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        load_best_model_at_end=has_validation,
        metric_for_best_model="eval_loss" if has_validation else None,
        greater_is_better=False if has_validation else None,
        prediction_loss_only=True,
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,  # a NaN must not be hidden
        report_to=list(training.report_to) or "none",
        dataloader_num_workers=training.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        **{checkpointing_argument(): False},  # checkpoint_language_model does it
        packing=False,
        padding_free=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        ddp_find_unused_parameters=False,  # LlavaSFTTrainer.compute_loss reaches the projector in every pass
        disable_tqdm=True,
    )
    args._n_gpu = 1  # one GPU per process: DataParallel cannot split packed rows
    return args


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Use algorithms that give equal results in every run, within a `with` block.

    Args:
        wanted: The recipe's `training.deterministic`; False changes nothing.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it; read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def describe_determinism(recipe: Recipe, *, resumed: bool) -> str | None:
    """Return a line about the equality of runs on a GPU; None where there is nothing to say, as on a CPU.

    Args:
        recipe: The recipe.
        resumed: Whether the run is resumed.
    """
    if not torch.cuda.is_available():
        return None
    if recipe.training.deterministic:
        return "deterministic: equal bit for bit in every run on this GPU, also after a resume"
    if not resumed:
        return None
    return (
        "resume: on a GPU the rest of the run equals an unbroken one up to rounding; runs that are started with "
        "training.deterministic=true are equal bit for bit"
    )


def checkpointing_argument() -> str:
    """Return the argument's name, which depends on the version of transformers."""
    names = {field.name for field in fields(SFTConfig)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
