"""Run a sweep: skip the runs that are finished, resume those that are not, and report those that fail."""

from __future__ import annotations

import contextlib
import gc
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console

from lora_llava.core.errors import ReportedError, StoppedError, UserError
from lora_llava.distributed.ranks import this_rank
from lora_llava.pages.preview_samples import count_of
from lora_llava.planning.run_plan import plan_run
from lora_llava.recipe import Recipe, recipe_hash
from lora_llava.runs.check_run import CHECKPOINTS
from lora_llava.runs.checkpoint import list_checkpoints, newest_complete
from lora_llava.runs.directory import METRICS_FILE, is_run, read_record
from lora_llava.splits.encoded_sources import show_progress
from lora_llava.training.finetune import finetune, finished_stage1, stage1_of, with_stage1_run
from lora_llava.training.sweep.grid import Sweep, SweepRun, describe
from lora_llava.training.sweep.sweep_results import (
    By,
    RunResult,
    SweepResult,
    ask_test,
    read_result,
    summarise_sweep,
)
from lora_llava.training.sweep.sweep_view import print_sweep, write_page

LOGS = "logs"
"""Folder of what the runs print."""


def run_sweep(sweep: Sweep, recipe_folder: Path, console: Console, *, by: By = "loss", dry: bool = False) -> None:
    """Run what is left of a sweep, choose a setting, ask its test rows once, and write the table and the page.

    Args:
        sweep: From `read_sweep`.
        recipe_folder: The folder in which its `stage1_recipe` is looked up.
        console: Prints progress and results.
        by: What chooses the setting: `loss` or `score`, of the validation rows.
        dry: Only print the runs and their steps.

    Raises:
        StoppedError: After Ctrl-C; the same command goes on.
        UserError: Before anything is trained, for a run that cannot start; or if no run could be finished.
    """
    if this_rank()[1] > 1:
        raise UserError("a sweep trains its runs one after the other in one process; start it without a launcher")
    generates = sweep.recipe.evaluation is not None and sweep.recipe.evaluation.generate_every is not None
    if by == "score" and not generates:
        raise UserError("--by score needs scores of validation rows; set evaluation.generate_every=50")
    left = [run for run in sweep.runs if not is_finished(run, recipe_folder)]
    steps = _count_steps(sweep, left)
    _print_plan(sweep, left, steps, console)
    if dry:
        return
    failed: dict[str, str] = {}
    for number, run in enumerate(sweep.runs, start=1):
        if run in left:
            console.print(
                f"run {number} of {len(sweep.runs)}: {run.name}, {count_of(steps[run.name], 'step')}", soft_wrap=True
            )
            try:
                line = _run(run, recipe_folder, sweep.folder / LOGS, failed)
            except StoppedError as error:
                place = f"run {number} of {len(sweep.runs)}, {run.name}"
                raise StoppedError(
                    f"stopped in {place}; run the same command to resume", error.exit_code - 128
                ) from None
            console.print(f"  {line}", soft_wrap=True)
    results = [
        RunResult.failed(run, failed[run.name]) if run.name in failed else read_result(run) for run in sweep.runs
    ]
    result = summarise_sweep(sweep, results, by)
    _finish(sweep, result, console)


def _finish(sweep: Sweep, result: SweepResult, console: Console) -> None:
    """Ask the test rows for the chosen run, write the files, and print the table."""
    if result.chosen is None and not result.failures:
        raise UserError(
            "no run has a validation score: evaluation.generate_every is more than the steps of a run; set a lower "
            "one, or --by loss"
        )
    if result.chosen is None:
        raise UserError("no run of the sweep could be finished: " + "; ".join(result.failures))
    result = ask_test(sweep, result)
    page = write_page(sweep, result)
    for each in print_sweep(result):
        console.print(each, soft_wrap=isinstance(each, str))
    console.print(f"page: {page}; figures: {page.with_suffix('.json')}", soft_wrap=True)


def is_finished(run: SweepRun, recipe_folder: Path) -> bool:
    """Check whether a run of the sweep is finished.

    Raises:
        UserError: If its folder has the run of another recipe.
    """
    folder = Path(run.recipe.output_dir)
    if not is_run(folder) or not (folder / METRICS_FILE).is_file():
        return False
    if read_record(folder)["recipe_hash"] != recipe_hash(_as_run(run.recipe, recipe_folder)):
        raise UserError(f"{folder} is a run of another recipe; set --output OTHER, or remove it to train it again")
    return True


def _as_run(recipe: Recipe, recipe_folder: Path) -> Recipe:
    """Return the recipe that the run directory keeps, which names the run of its Stage 1."""
    stage1 = stage1_of(recipe, recipe_folder)
    return recipe if stage1 is None else with_stage1_run(recipe, Path(stage1.output_dir))


def _count_steps(sweep: Sweep, left: Iterable[SweepRun]) -> dict[str, int]:
    """Plan one run of each setting, which tries what can fail before training; return the steps of the runs by name."""
    waiting: set[str] = {run.name for run in left}
    steps: dict[str, int] = {}
    problems: dict[str, list[str]] = {}
    for runs in sweep.settings:
        names = [run.name for run in runs if run.name in waiting]
        if not names:
            continue
        try:
            plan = plan_run(next(run.recipe for run in runs if run.name in names), show_progress)
            if plan.refusal is not None:
                raise plan.refusal
        except UserError as error:
            problems.setdefault(str(error), []).append(describe(runs[0].setting))
            continue
        steps |= dict.fromkeys(names, plan.order.steps)
    if problems:
        lines = [problem if len(found) > 1 else f"{found[0]}: {problem}" for problem, found in problems.items()]
        raise UserError("\n".join(lines))
    return steps


def _print_plan(sweep: Sweep, left: list[SweepRun], steps: dict[str, int], console: Console) -> None:
    settings, count = len(sweep.settings), len(sweep.runs)
    for runs in sweep.settings:
        waiting = [run for run in runs if run in left]
        done = f", {len(runs) - len(waiting)} finished" if len(waiting) < len(runs) else ""
        each = f", {count_of(steps[waiting[0].name], 'step')} each" if waiting else ""
        seeds = ", ".join(str(run.seed) for run in runs)
        console.print(f"{describe(runs[0].setting)}: seeds {seeds}{each}{done}", soft_wrap=True)
    at_most = "at most " if sweep.recipe.training.early_stopping else ""
    console.print(
        f"{count_of(settings, 'setting')}, {count_of(count, 'run')}, {count - len(left)} finished; {at_most}"
        f"{count_of(sum(steps.values()), 'step')} to train; runs in {sweep.folder}",
        soft_wrap=True,
    )


def _run(run: SweepRun, recipe_folder: Path, logs: Path, failed: dict[str, str]) -> str:
    """Train one run, with what it prints in a file, and return a line about it."""
    folder, start = Path(run.recipe.output_dir), time.monotonic()
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{run.name}.txt"
    try:
        with log.open("a", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
            damaged = bool(list_checkpoints(folder / CHECKPOINTS)) and newest_complete(folder / CHECKPOINTS)[0] is None
            finetune(
                run.recipe,
                recipe_folder,
                resume=not damaged and _can_resume(run, recipe_folder),
                overwrite=damaged,
                console=Console(file=stream, width=120, highlight=False, markup=False),
            )
    except StoppedError:
        raise
    except ReportedError as error:
        failed[run.name] = " ".join(str(error).split())
    except Exception as error:  # one run's failure must not end the others
        with log.open("a", encoding="utf-8") as stream:
            traceback.print_exc(file=stream)
        failed[run.name] = f"{type(error).__name__}: {' '.join(str(error).split()):.200} (see {log})"
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if run.name in failed:
        return f"failed: {failed[run.name]}"
    result = read_result(run)
    return f"validation loss {result.loss:.4f} at step {result.step:,}, {time.monotonic() - start:.0f} s"


def _can_resume(run: SweepRun, recipe_folder: Path) -> bool:
    """Check whether the run, or the Stage 1 that it starts from, has a checkpoint."""
    if list_checkpoints(Path(run.recipe.output_dir) / CHECKPOINTS):
        return True
    stage1 = stage1_of(run.recipe, recipe_folder)
    if stage1 is None or finished_stage1(stage1):
        return False
    return bool(list_checkpoints(Path(stage1.output_dir) / CHECKPOINTS))
