"""`lora-llava finetune`: run a recipe from its checks to the evaluation."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_llava.core.device import free_memory
from lora_llava.core.errors import UserError
from lora_llava.core.storage import cache_folder
from lora_llava.distributed.ranks import first_alone, first_before_others, is_first, this_rank
from lora_llava.evaluation.figures.majority import MajorityAnswers
from lora_llava.evaluation.run_report import REPORT_FILE, write_report
from lora_llava.evaluation.scoring import (
    EvaluationResult,
    evaluate_run,
    run_figures,
    training_answers,
    weigh_few_answers,
)
from lora_llava.evaluation.tables import tables_view
from lora_llava.model.adapters import load_projector
from lora_llava.model.loading import describe_dtype
from lora_llava.model.start import RUN_FILE, Base, describe_newline, prepare_base
from lora_llava.planning import plan_tables
from lora_llava.planning.continued_run import refuse_own_folder
from lora_llava.planning.memory_budget import limit_memory
from lora_llava.planning.run_plan import RunPlan, plan_run
from lora_llava.recipe import Recipe
from lora_llava.runs.check_run import CHECKPOINTS
from lora_llava.runs.checkpoint import list_checkpoints, set_aside
from lora_llava.runs.directory import (
    METRICS_FILE,
    is_run,
    machine,
    only_run,
    peak_memory,
    start_run,
    versions,
    write_json,
)
from lora_llava.runs.identity import IDENTITY_FILE, run_identity
from lora_llava.runs.resume import Start, find_start, keep_order, refuse_unfinished, same_run
from lora_llava.runs.stage1_runs import check_stage1_run, finished_stage1, stage1_of, with_stage1_run
from lora_llava.splits.encoded_sources import show_progress
from lora_llava.splits.seen_rows import write_seen
from lora_llava.splits.split_rows import asked_split, sealed
from lora_llava.training.adapter_start import continue_adapter, saved_config, start_adapters
from lora_llava.training.features import cache_features
from lora_llava.training.stages import TrainResult, build_feeds, build_trained_model, describe_plan, train
from lora_llava.training.trainer_arguments import describe_determinism, determinism

BEFORE_FILE = "before.json"


def finetune(
    recipe: Recipe,
    recipe_folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changes: Iterable[str] = (),
    console: Console,
) -> dict[str, Any]:
    """Run a recipe, after the Stage 1 recipe it starts from if that has no result yet.

    Args:
        recipe: The recipe.
        recipe_folder: The folder in which its `stage1_recipe` is looked up.
        resume: Resume from the newest complete checkpoint.
        overwrite: Replace a run in `output_dir`, finished or not.
        accept_changes: Keys of the recipe that may differ from the checkpoint's.
        console: Prints progress and results.

    Returns:
        The content of `metrics.json`.

    Raises:
        UserError: For anything that would make the run fail, before a weight is loaded.
    """
    console.quiet = console.quiet or not is_first()
    folder = Path(recipe.output_dir)
    refuse_own_folder(recipe)
    if is_run(folder) and (folder / METRICS_FILE).is_file() and not overwrite:
        raise UserError(f"output_dir: {folder} holds a finished run; set output_dir=OTHER, or --overwrite")
    if resume and overwrite:
        raise UserError("--resume continues a run and --overwrite replaces it; use one of them")
    with determinism(recipe.training.deterministic):  # before anything runs on a GPU
        return _run(recipe, recipe_folder, folder, resume, overwrite, accept_changes, console)


def _run(
    recipe: Recipe,
    recipe_folder: Path,
    folder: Path,
    resume: bool,
    overwrite: bool,
    accept_changes: Iterable[str],
    console: Console,
) -> dict[str, Any]:
    stage1 = stage1_of(recipe, recipe_folder)
    if not resume and not overwrite:
        refuse_unfinished(folder / CHECKPOINTS)
    if stage1 is None:
        plan = _plan(recipe, resume, console)
        _refuse_if_too_large([plan])
    else:
        plan, resume = _after_stage1(stage1, recipe, resume, overwrite, console)
    with _alone(folder):  # only now, so that a wrong recipe leaves no folder
        if not resume and not overwrite:
            refuse_unfinished(folder / CHECKPOINTS)
        return _run_stage(plan, resume, tuple(accept_changes), console)


def _alone(folder: Path) -> AbstractContextManager[None]:
    return only_run(folder) if is_first() else nullcontext()


def _after_stage1(
    stage1: Recipe, recipe: Recipe, resume: bool, overwrite: bool, console: Console
) -> tuple[RunPlan, bool]:
    """Run Stage 1 if it has no result yet; return the plan of Stage 2 and whether to resume it."""
    run = Path(stage1.output_dir)
    plans = [] if finished_stage1(stage1) else [_plan(stage1, resume, console)]
    plan = _plan(recipe, resume, console)
    _refuse_if_too_large([*plans, plan])
    for stage1_plan in plans:
        with _alone(run):
            left = bool(list_checkpoints(run / CHECKPOINTS)) and not overwrite
            if left and not resume:
                refuse_unfinished(run / CHECKPOINTS)
            _run_stage(stage1_plan, left, (), console)
            resume = resume and bool(list_checkpoints(Path(recipe.output_dir) / CHECKPOINTS))
    plan.recipe = with_stage1_run(plan.recipe, run)
    return plan, resume


def _plan(recipe: Recipe, resume: bool, console: Console) -> RunPlan:
    check_stage1_run(recipe)
    if resume:
        recipe = keep_order(recipe, Path(recipe.output_dir) / CHECKPOINTS)
    with first_before_others():
        plan = plan_run(recipe, show_progress)
    plan_tables.print_data(plan, console)
    longest = max(split.report.longest for split in plan.splits.values())
    plan_tables.print_memory(recipe, plan.step, longest, console)
    return plan


def _refuse_if_too_large(plans: Iterable[RunPlan]) -> None:
    for plan in plans:
        if plan.refusal is not None:
            raise plan.refusal


def _run_stage(plan: RunPlan, resume: bool, accepted: tuple[str, ...], console: Console) -> dict[str, Any]:
    recipe = plan.recipe
    folder = Path(recipe.output_dir)
    start = time.monotonic()
    resumed = find_start(folder / CHECKPOINTS, recipe, accepted, this_rank()[1]) if resume else None
    with first_before_others():
        base = prepare_base(recipe.model, recipe.seed)
        identity = run_identity(plan, base)
    if resumed is not None:
        identity = _check_resumed(resumed, identity, plan, console)
    first_alone(lambda: _open_run(folder, plan, identity, resumed is None))
    limit_memory(recipe)
    cache_features(plan, base, console)
    model = build_trained_model(
        recipe, replace(base, initial_projector=None), saved_config(recipe, resumed), plan.step.host_layers
    )
    freeze_plan = describe_plan(model)
    plan_tables.print_freeze_plan(freeze_plan, console)
    console.print(f"attention: {plan.computation.attention}", soft_wrap=True)
    for line in (describe_dtype(plan.computation.dtype), describe_determinism(recipe, resumed=resumed is not None)):
        if line:
            console.print(line, soft_wrap=True)
    if line := continue_adapter(model, recipe):
        console.print(line, soft_wrap=True, markup=False)
    answers = training_answers(plan)
    before = _evaluate_before(model, plan, identity, resumed is not None, answers, console)
    if base.initial_projector is not None:
        load_projector(model, base.initial_projector)
    if recipe.stage == 2 and (line := describe_newline(base)):
        console.print(line, soft_wrap=True, markup=False)
    if resumed is None and (line := start_adapters(plan, base, model, build_feeds(plan)[0])):
        console.print(line, soft_wrap=True)
        freeze_plan = describe_plan(model)  # EVA changes the ranks
    if resumed is not None:
        first_alone(lambda: set_aside(folder / CHECKPOINTS, resumed.checkpoint))
    with sealed(plan.splits.get("test")):
        result = train(plan, base, model, resumed, identity)
    after = evaluate_run(model, plan, "after")
    figures = run_figures(model, plan, after, answers)
    tables = {"before": before, "after": after.table if after else None, **({"figures": figures} if figures else {})}
    metrics = _metrics(plan, base, freeze_plan, result, tables)
    first_alone(lambda: _write_results(folder, recipe, metrics, after))
    spent = f"{time.monotonic() - start:.0f} s {'in all' if resumed is None else 'since it was resumed'}"
    _print_result(recipe, metrics, spent, console)
    del model
    free_memory()
    return metrics


def _open_run(folder: Path, plan: RunPlan, identity: dict[str, Any], again: bool) -> None:
    start_run(folder, plan.recipe, {name: split.fingerprint() for name, split in plan.splits.items()})
    write_json(folder / IDENTITY_FILE, identity)
    write_seen(folder, replace(plan.seen, run=plan.recipe.output_dir), plan.earlier)
    (folder / RUN_FILE).unlink(missing_ok=True)  # written again when the run is complete
    if again:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        for file in [*(folder / name for name in (METRICS_FILE, REPORT_FILE, BEFORE_FILE)), *_predictions(folder)]:
            file.unlink(missing_ok=True)  # of the replaced run


def _predictions(folder: Path) -> list[Path]:
    return sorted(folder.glob("predictions_*.jsonl"))


def _write_results(folder: Path, recipe: Recipe, metrics: dict[str, Any], after: EvaluationResult | None) -> None:
    write_json(folder / METRICS_FILE, metrics)
    write_report(folder, recipe, metrics, after)


def _evaluate_before(
    model: Any,
    plan: RunPlan,
    identity: dict[str, Any],
    again: bool,
    answers: MajorityAnswers | None,
    console: Console,
) -> Any:
    """Return the table before training.

    A resumed run reuses the table from its start if the settings of the evaluation are the same.
    """
    file, settings = Path(plan.recipe.output_dir) / BEFORE_FILE, _evaluation_settings(plan, identity)
    if again and file.is_file():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a partial file, or one of an earlier version
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["asked"] == settings:
                return kept["table"]
        console.print("the settings of the evaluation changed; the table before training is computed again")
    answered = evaluate_run(model, plan, "before")
    weigh_few_answers(model, plan, answered, answers)
    table = answered.table if answered else None
    first_alone(lambda: write_json(file, {"asked": settings, "table": table}))
    return table


def _evaluation_settings(plan: RunPlan, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the table before training depends on besides the model: the settings and the rows."""
    evaluation, split = plan.recipe.evaluation, asked_split(plan.splits)
    if evaluation is None or split is None:
        return None
    chosen = evaluation.model_dump(mode="json", exclude={"after", "generate_every", "generate_rows", "shuffled"})
    rows = {name: identity["data"][split][name] for name in ("tokens", "images", "asked")}
    return {**chosen, "split": split, "rows": rows}


def _check_resumed(start: Start, identity: dict[str, Any], plan: RunPlan, console: Console) -> dict[str, Any]:
    """Check that a resumed run is the same, print where it resumes, and return its identity."""
    identity, lines = same_run(start, identity, plan.splits)
    for line in (*start.lines, *lines):
        console.print(f"resume: {line}", soft_wrap=True)
    return identity


def _metrics(
    plan: RunPlan, base: Base, freeze_plan: list[dict[str, Any]], result: TrainResult, tables: dict[str, Any]
) -> dict[str, Any]:
    return {
        **tables,
        "train": result.as_dict(),
        "step": {
            "optimizer": plan.computation.optimizer,
            "planned_bytes": plan.step.peak,
            "checkpointed_layers": plan.step.checkpointed,
            "offloaded": plan.step.offloaded,
            "host_layers": plan.step.host_layers,
        },
        "data": {name: split.report.as_dict() for name, split in plan.splits.items()},
        "model": {
            "base": base.as_dict(),
            "trained_parameters": plan.trained_parameters,
            "freeze_plan": freeze_plan,
        },
        "continues": _continued(plan),
        "machine": machine(),
        "versions": versions(),
    }


def _continued(plan: RunPlan) -> dict[str, Any] | None:
    """Return the run that a run continues or whose merged model it starts from, and what that means for its rows."""
    return {"run": plan.earlier.run, "rows": list(plan.notes)} if plan.earlier is not None else None


def dry_run(recipe: Recipe, recipe_folder: Path, console: Console) -> None:
    """Print what a run would do: downloads, rows, steps, trained parameters, one marked sample. Loads no weights.

    Raises:
        UserError: For anything that would make the run fail.
    """
    stage1 = stage1_of(recipe, recipe_folder)
    for each in [stage1, recipe] if stage1 is not None and not finished_stage1(stage1) else [recipe]:
        plan = _plan(each, False, console)
        plan_tables.print_downloads(plan, cache_folder(), console)
        plan_tables.print_parameters(plan, console)
        plan_tables.print_sample(plan, console)
        _refuse_if_too_large([plan])


def _print_result(recipe: Recipe, metrics: dict[str, Any], spent: str, console: Console) -> None:
    """Print the tables before and after, memory, time and the run directory."""
    tables = {name: metrics[name] for name in ("before", "after") if metrics[name] is not None}
    if tables:
        title = "ScienceQA, test split" if recipe.data.format == "scienceqa" else "Answers"
        console.print(tables_view(title, tables, metrics.get("figures")))
    train = metrics["train"]
    if reason := train["stopped_early"]:
        console.print(f"stopped early at step {train['steps']:,} of {train['planned_steps']:,}: {reason}")
    loss, step = train["best_validation_loss"], train["kept_step"]
    kept = "" if loss is None else f"; kept the checkpoint of step {step:,}, validation loss {loss:.4f}"
    console.print(
        f"trained {train['steps']:,} steps, {train['tokens']:,} tokens in {train['seconds']:.0f} s "
        f"({train['tokens'] / train['seconds']:,.0f} tokens/s); {spent}; peak memory {peak_memory(train)}{kept}"
    )
    console.print(f"run directory: {recipe.output_dir}; open {recipe.output_dir}/report.html", soft_wrap=True)
