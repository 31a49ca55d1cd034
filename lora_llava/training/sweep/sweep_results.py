"""The results of a sweep: mean and spread over seeds, the choice by validation, and the test rows asked once."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lora_llava.core.errors import UserError
from lora_llava.evaluation.evaluate import evaluate
from lora_llava.model.weights.names import ADAPTER_FILE
from lora_llava.runs.directory import METRICS_FILE, read_data_hashes, read_record, write_json
from lora_llava.training.sweep.grid import Sweep, SweepRun, describe

SWEEP_FILE = "sweep.json"
_ASKED = "test_asked"
"""Key of the record of every time that test rows were asked, which no later call removes."""
By = Literal["loss", "score"]


@dataclass(frozen=True)
class RunResult:
    """The result of one run.

    Attributes:
        name: Name of its folder.
        seed: Its seed.
        loss: Validation loss of the checkpoint kept, in nats per trained token; NaN for a failed run.
        step: Step of that checkpoint.
        score: Score of validation rows in percent, from the last measurement up to that step; None without one.
        curve: Pairs of step and validation loss.
        rows: Hash of its validation rows.
        failure: Why it failed; None if it did not.
    """

    name: str
    seed: int
    loss: float = math.nan
    step: int = 0
    score: float | None = None
    curve: Sequence[tuple[float, float]] = ()
    rows: str | None = None
    failure: str | None = None

    @classmethod
    def failed(cls, run: SweepRun, problem: str) -> RunResult:
        """Return the result of a run that failed."""
        return cls(run.name, run.seed, failure=problem)


@dataclass(frozen=True)
class SettingResult:
    """The results of one setting.

    Attributes:
        setting: The swept keys with their values.
        runs: Its runs, one for each seed.
    """

    setting: Mapping[str, Any]
    runs: Sequence[RunResult]

    @property
    def finished(self) -> list[RunResult]:
        return [run for run in self.runs if run.failure is None]

    def values(self, by: By) -> list[float]:
        """The finished runs' validation losses or scores."""
        found = [run.loss if by == "loss" else run.score for run in self.finished]
        return [value for value in found if value is not None]

    def mean(self, by: By) -> float:
        """The mean over seeds; NaN without a finished run."""
        values = self.values(by)
        return statistics.fmean(values) if values else math.nan

    def spread(self, by: By) -> float | None:
        """The standard deviation over seeds, with one less in the denominator; None with fewer than two runs."""
        values = self.values(by)
        return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        by: What chose the setting.
        settings: All settings, the best first; those with fewer finished runs follow.
        chosen: The chosen run; None if none finished.
        why: How the run was chosen among its setting's seeds.
        notes: What a reader should know.
        test: The table of the test rows, or None.
        test_note: What was asked of the test rows.
    """

    by: By
    settings: Sequence[SettingResult]
    chosen: RunResult | None
    why: str = ""
    notes: Sequence[str] = ()
    test: Mapping[str, Any] | None = None
    test_note: str = ""

    @property
    def failures(self) -> list[str]:
        return [f"{run.name}: {run.failure}" for each in self.settings for run in each.runs if run.failure]


def read_result(run: SweepRun) -> RunResult:
    """Read the result of a finished run.

    Raises:
        UserError: If its figures cannot be read.
    """
    folder = Path(run.recipe.output_dir)
    try:
        train = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))["train"]
        loss, step = float(train["best_validation_loss"]), int(train["kept_step"])
        curve = [(float(at), float(value)) for at, value in train["loss_curve"]["validation"]]
        scores = [(int(at), float(value)) for at, value in train["curves"]["validation_score"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder / METRICS_FILE} cannot be read ({error}); remove {folder} to train it again"
        ) from None
    measured = [value for at, value in scores if at <= step] or [value for _, value in scores[:1]]
    rows = read_data_hashes(folder).get("validation")
    return RunResult(run.name, run.seed, loss, step, measured[-1] if measured else None, curve, rows)


def summarise_sweep(sweep: Sweep, results: Sequence[RunResult], by: By = "loss") -> SweepResult:
    """Order the settings and choose one.

    Args:
        sweep: The sweep.
        results: One for each of its runs, in their order.
        by: `loss`: the lowest mean validation loss; `score`: the highest mean score of validation rows.

    Returns:
        The result, without the test rows.
    """
    found = {each.name: each for each in results}
    settings = [SettingResult(runs[0].setting, [found[run.name] for run in runs]) for runs in sweep.settings]
    sign = 1 if by == "loss" else -1
    settings.sort(key=lambda each: (-len(each.values(by)), _last_if_nan(sign * each.mean(by))))
    if not settings[0].values(by):
        return SweepResult(by, settings, None)
    runs = settings[0].finished
    if len(runs) == 1:
        return SweepResult(by, settings, runs[0], "its only finished run", _notes(settings))
    if len({run.rows for run in runs}) == 1:
        best = min(runs, key=lambda run: _last_if_nan(sign * (run.loss if by == "loss" else run.score or 0.0)))
        why = f"the seed with the {'lowest validation loss' if by == 'loss' else 'highest validation score'}"
        return SweepResult(by, settings, best, why, _notes(settings))
    why = "the first seed, as each seed has validation rows of its own"
    return SweepResult(by, settings, runs[0], why, _notes(settings))


def _last_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _notes(settings: Sequence[SettingResult]) -> list[str]:
    """Return notes on settings that cannot be compared with the others."""
    notes = []
    rows: dict[int, set[str | None]] = {}
    for run in (run for each in settings for run in each.finished):
        rows.setdefault(run.seed, set()).add(run.rows)
    if any(len(hashes) > 1 for hashes in rows.values()):
        notes.append("The settings have different validation rows, so their losses cannot be compared.")
    most = max(len(each.finished) for each in settings)
    if any(len(each.finished) < most for each in settings):
        notes.append("A setting with fewer finished runs than others is ranked after them and not chosen.")
    return notes


def ask_test(sweep: Sweep, result: SweepResult) -> SweepResult:
    """Evaluate the chosen run on the test rows, unless an earlier call did.

    Args:
        sweep: The sweep.
        result: With a chosen run.

    Returns:
        The result with the table of the test rows.

    Raises:
        UserError: If the rows cannot be evaluated.
    """
    chosen, recipe = result.chosen, sweep.recipe
    assert chosen is not None
    data = recipe.data
    has_test = data.splits.test is not None if data.format == "scienceqa" else bool(data.test_rows or data.test_source)
    if recipe.evaluation is None or not has_test or data.format == "captions":
        reason = "the recipe has no evaluation" if recipe.evaluation is None else "the recipe has no test rows"
        return replace(result, test_note=f"no test rows were asked: {reason}")
    folder = sweep.folder / chosen.name
    adapter = read_record(folder).get("adapter_sha256") or str((folder / ADAPTER_FILE).stat().st_mtime_ns)
    asked = _asked_before(sweep.folder)
    mine = next((each for each in asked if (each["run"], each["adapter"]) == (chosen.name, adapter)), None)
    if mine is None:
        mine = {"run": chosen.name, "adapter": adapter, "table": dict(evaluate(str(folder)))}
        asked.append(mine)
        write_json(sweep.folder / SWEEP_FILE, {_ASKED: asked})
    note = "the test rows were asked once, for the chosen run"
    others = [each["run"] for each in asked if each is not mine]
    if others:
        names = ", ".join(dict.fromkeys(others))
        note = f"the test rows were asked {len(asked)} times; the table is of {chosen.name}, chosen before: {names}"
    return replace(result, test=mine["table"], test_note=note)


def _asked_before(folder: Path) -> list[dict[str, Any]]:
    """Return the run, the adapter's hash and the table of each time that test rows were asked, the first time first."""
    file = folder / SWEEP_FILE
    try:
        return [dict(each) for each in json.loads(file.read_text(encoding="utf-8"))[_ASKED]]
    except (FileNotFoundError, KeyError):
        return []
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); remove it, and the test rows are asked again") from None


def write_figures(sweep: Sweep, result: SweepResult) -> Path:
    """Write `sweep.json`: every run, mean and spread of every setting, the chosen run and the test table.

    Returns:
        The file.
    """
    assert result.chosen is not None
    settings = [
        {
            "setting": dict(each.setting),
            "mean": _number(each.mean(result.by)),
            "standard_deviation": each.spread(result.by),
            "runs": [asdict(run) | {"loss": _number(run.loss)} for run in each.runs],
        }
        for each in result.settings
    ]
    asked = _asked_before(sweep.folder)
    chosen = [each for each in asked if each["run"] == result.chosen.name] if result.test is not None else []
    content = {
        "chosen_by": f"validation {result.by}, mean over seeds",
        "chosen": {"run": result.chosen.name, "setting": dict(result.settings[0].setting), "why": result.why},
        "settings": settings,
        "notes": list(result.notes),
        "test_note": result.test_note,
        "test": chosen[-1] if chosen else None,
        _ASKED: asked,
    }
    write_json(sweep.folder / SWEEP_FILE, content)
    return sweep.folder / SWEEP_FILE


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def title_of(setting: Mapping[str, Any]) -> str:
    """Return a setting with the last parts of its keys: `learning_rate=0.0001 r=8`."""
    return describe({key.rpartition(".")[2]: value for key, value in setting.items()})
