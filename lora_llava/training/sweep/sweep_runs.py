"""Run a sweep: skip the runs that are finished, resume those that are not, and report those that fail."""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from lora_llava.core.device import free_memory
from lora_llava.core.errors import ReportedError, StoppedError, UserError
from lora_llava.distributed.ranks import this_rank
from lora_llava.pages.preview_samples import count_of
from lora_llava.planning.run_plan import plan_run
from lora_llava.recipe import Recipe, recipe_hash
from lora_llava.runs.check_run import CHECKPOINTS
from lora_llava.runs.checkpoint import list_checkpoints, newest_complete
from lora_llava.runs.directory import METRICS_FILE, is_run, read_record
from lora_llava.runs.stage1_runs import check_stage1_run, finished_stage1, stage1_of, with_stage1_run
from lora_llava.splits.encoded_sources import show_progress
from lora_llava.training.finetune import finetune
from lora_llava.training.sweep.grid import Sweep, SweepRun, describe
from lora_llava.training.sweep.search import Search, TrialBook
from lora_llava.training.sweep.sweep_results import (
    By,
    RunResult,
    SettingResult,
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
    _check_start(sweep.recipe, by)
    left = [run for run in sweep.runs if not is_finished(run, recipe_folder)]
    steps = _count_steps(sweep, left)
    _print_plan(sweep, left, steps, console)
    if dry:
        return
    results = []
    for number, run in enumerate(sweep.runs, start=1):
        place = f"run {number} of {len(sweep.runs)}"
        if run in left:
            console.print(f"{place}: {run.name}, {count_of(steps[run.name], 'step')}", soft_wrap=True)
        results.append(_result(run, place, recipe_folder, sweep.folder, console, train=run in left))
    _finish(sweep, summarise_sweep(sweep, results, by), console)


def run_search(search: Search, recipe_folder: Path, console: Console, *, by: By = "loss", dry: bool = False) -> None:
    """Run what is left of a search, and end as `run_sweep` does; its arguments and errors are the same."""
    _check_start(search.values.recipe, by)
    ends = [run for corner in (search.corners()[0], search.corners()[-1]) for run in search.values.runs(corner)]
    steps = _count_steps(Sweep(search.folder, search.values.recipe, ends), ends).values()
    each = count_of(max(steps), "step") if min(steps) == max(steps) else f"{min(steps):,} to {max(steps):,} steps"
    seeds = ", ".join(map(str, search.values.seeds))
    console.print(f"search {search.describe()}", soft_wrap=True)
    console.print(
        f"{count_of(search.trials, 'trial')}, seeds {seeds}, {each} each; runs in {search.folder}", soft_wrap=True
    )
    if dry:
        return
    book = TrialBook(search, by)
    runs: list[SweepRun] = []
    results: list[RunResult] = []
    for number, mine in enumerate(book.settings(), start=1):
        found = []
        for run in mine:
            place = f"trial {number} of {max(number, search.trials)}"
            train = not is_finished(run, recipe_folder)
            if train:
                console.print(f"{place}: {run.name}", soft_wrap=True)
            found.append(_result(run, place, recipe_folder, search.folder, console, train=train))
        setting = SettingResult(mine[0].setting, found)
        if len(setting.finished) == len(found) and math.isfinite(setting.mean(by)):
            book.record(number - 1, setting.mean(by))  # else it stays open, and the same command tries it again
        runs += mine
        results += found
    if len(runs) < search.trials * len(search.values.seeds):
        console.print(f"the search found only {len(runs) // len(search.values.seeds)} settings", soft_wrap=True)
    sweep = Sweep(search.folder, search.values.recipe, runs)
    _finish(sweep, summarise_sweep(sweep, results, by), console)


def _check_start(recipe: Recipe, by: By) -> None:
    if this_rank()[1] > 1:
        raise UserError("a sweep trains its runs one after the other in one process; start it without a launcher")
    generates = recipe.evaluation is not None and recipe.evaluation.generate_every is not None
    if by == "score" and not generates:
        raise UserError("--by score needs scores of validation rows; set evaluation.generate_every=50")


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
            recipe = next(run.recipe for run in runs if run.name in names)
            check_stage1_run(recipe)
            plan = plan_run(recipe, show_progress)
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


def _result(
    run: SweepRun, place: str, recipe_folder: Path, folder: Path, console: Console, *, train: bool
) -> RunResult:
    """Train a run unless it is finished, and return its result; one run's failure must not end the others."""
    start, log = time.monotonic(), folder / LOGS / f"{run.name}.txt"
    try:
        if train:
            _train(run, recipe_folder, log)
        result = read_result(run)
    except StoppedError as error:
        raise StoppedError(
            f"stopped in {place}, {run.name}; run the same command to resume", error.exit_code - 128
        ) from None
    except ReportedError as error:
        result = RunResult.failed(run, " ".join(str(error).split()))
    except Exception as error:
        with log.open("a", encoding="utf-8") as stream:
            traceback.print_exc(file=stream)
        result = RunResult.failed(run, f"{type(error).__name__}: {' '.join(str(error).split()):.200} (see {log})")
    if result.failure:
        console.print(f"  failed: {result.failure}", soft_wrap=True)
    elif train:
        seconds = time.monotonic() - start
        console.print(f"  validation loss {result.loss:.4f} at step {result.step:,}, {seconds:.0f} s", soft_wrap=True)
    return result


def _train(run: SweepRun, recipe_folder: Path, log: Path) -> None:
    """Train one run, with what it prints in a file."""
    folder = Path(run.recipe.output_dir)
    log.parent.mkdir(parents=True, exist_ok=True)
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
    finally:
        free_memory()


def _can_resume(run: SweepRun, recipe_folder: Path) -> bool:
    """Check whether the run, or the Stage 1 that it starts from, has a checkpoint."""
    if list_checkpoints(Path(run.recipe.output_dir) / CHECKPOINTS):
        return True
    stage1 = stage1_of(run.recipe, recipe_folder)
    if stage1 is None or finished_stage1(stage1):
        return False
    return bool(list_checkpoints(Path(stage1.output_dir) / CHECKPOINTS))
