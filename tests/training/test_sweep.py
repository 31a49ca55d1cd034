"""`lora-llava sweep`: the grid, a sweep that fails, stops and goes on, the choice, and the test rows asked once."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_llava.commands.main import main
from lora_llava.core.errors import StoppedError, UserError
from lora_llava.core.storage import cache_folder
from lora_llava.evaluation import scoring
from lora_llava.recipe import RecipeError, dump_recipe
from lora_llava.recipe.io import check_recipe
from lora_llava.training.sweep import sweep_results, sweep_runs
from lora_llava.training.sweep.grid import Sweep, read_sweep, split_values
from lora_llava.training.sweep.sweep_results import (
    RunResult,
    SettingResult,
    SweepResult,
    ask_test,
    summarise_sweep,
    write_figures,
)
from lora_llava.training.sweep.sweep_runs import run_sweep
from lora_llava.training.sweep.sweep_view import print_sweep
from tests.ends import act_at

GRID = ["training.learning_rate=1e-3,5e-3"]
NAMES = [f"learning_rate-{rate}_seed-{seed}" for rate in ("0.001", "0.005") for seed in (0, 1)]


@pytest.fixture
def recipe(stage2_content: dict[str, Any], tmp_path: Path) -> Path:
    stage2_content["training"] |= {"max_steps": 2, "eval_every": 1}
    file = tmp_path / "mine.yaml"
    file.write_text(dump_recipe(check_recipe(stage2_content, "test")))
    return file


def swept(sweep: Sweep, **options: Any) -> str:
    stream = io.StringIO()
    run_sweep(sweep, Path(), Console(file=stream, width=200), **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,2e-4", ["1e-4", "2e-4"]),
        ("8", ["8"]),
        ("", [""]),
        ("[q_proj],[v_proj]", ["[q_proj]", "[v_proj]"]),
        ("[q_proj, v_proj]", ["[q_proj, v_proj]"]),
        ("all-linear, [q_proj, v_proj]", ["all-linear", "[q_proj, v_proj]"]),
        ("{a: b},{c: d, e: f}", ["{a: b}", "{c: d, e: f}"]),
        ('"a, b",c', ['"a, b"', "c"]),
        ("'it, so',\"\"", ["'it, so'", '""']),
        ('["a, b", c],d', ['["a, b", c]', "d"]),
        ("don't,do", ["don't", "do"]),
        ("a,,b", ["a", "", "b"]),
    ],
)
def test_values_are_split_at_commas(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_a_grid_has_every_combination_with_every_seed(recipe: Path, tmp_path: Path) -> None:
    sweep = read_sweep(
        str(recipe), ["lora.r=4,8", "training.max_steps=3", "lora.targets=[q_proj, v_proj],all-linear"], seeds=2
    )
    assert sweep.folder == Path(f"{tmp_path}/run-sweep")
    assert [run.name for run in sweep.runs] == [
        f"r-{r}_targets-{targets}_seed-{seed}"
        for r in (4, 8)
        for targets in ("q_proj+v_proj", "all-linear")
        for seed in (0, 1)
    ]
    first = sweep.runs[0].recipe
    assert (first.lora and (first.lora.r, first.lora.targets), first.training.max_steps) == (
        (4, ("q_proj", "v_proj")),
        3,
    )
    assert first.evaluation is not None
    assert (first.evaluation.before, first.evaluation.after) == (0, 0)
    assert {run.recipe.output_dir for run in sweep.runs} == {str(sweep.folder / run.name) for run in sweep.runs}
    assert [len(runs) for runs in sweep.settings] == [2, 2, 2, 2]


def test_names_of_folders(recipe: Path) -> None:
    def names(*overrides: str) -> list[str]:
        return [run.name for run in read_sweep(str(recipe), overrides, output="out").runs]

    assert names("seed=3,5") == ["seed-3", "seed-5"]
    assert names("training.learning_rate=1e-5,0.5") == ["learning_rate-1e-05_seed-0", "learning_rate-0.5_seed-0"]
    assert names("lora.r=2,4", "lora.vision={r: 3}") == ["r-2_seed-0", "r-4_seed-0"]
    assert names("lora.vision={r: 2, alpha: 1},null") == ["vision-r-2-alpha-1_seed-0", "vision-null_seed-0"]
    assert names("lora.vision={}", "lora.r=2,4", "lora.vision.r=8,16")[0] == "lora.r-2_lora.vision.r-8_seed-0"
    upper = names('data.system_prompt=Be brief.,"be brief."')
    assert [re.sub("[0-9a-f]{8}", "#", name) for name in upper] == [
        "system_prompt-Be-brief._#_seed-0",
        "system_prompt-be-brief._#_seed-0",
    ]
    assert len(set(upper)) == 2
    assert {len(name) for name in names(f"data.system_prompt={'a' * 300},{'b' * 300}")} == {100}


@pytest.mark.parametrize(
    ("overrides", "seeds", "message"),
    [
        (["lora.r=8,8.0,x"], 1, "lora.r is 8.0; it should be a valid integer (did you mean 8?)"),
        (["lora.rank=8,16"], 1, 'lora.rank is not a key of a recipe (did you mean "lora.r"?)'),
        (["training.learning_rate=1e-4,0.0001"], 1, "the value 0.0001 is listed twice; keep one"),
        (["lora.r=8,"], 1, "override 'lora.r=8,': a value between its commas is empty; remove a comma"),
        (["lora.r=8", "lora.r=4"], 1, "lora.r is given twice; list its values once: lora.r=VALUE,VALUE"),
        (["lora.r"], 1, "override 'lora.r': write key.sub=value,value"),
        (["output_dir=a,b"], 1, "output_dir cannot be swept: each run has a folder of its own; set --output FOLDER"),
        (["seed=1,2"], 2, "seed has several values and --seeds is set; drop one"),
        (
            ["data.splits.validation=null"],
            1,
            "a sweep chooses by the validation loss and needs validation rows; set data.validation_rows=20",
        ),
    ],
)
def test_a_grid_that_is_refused(recipe: Path, overrides: list[str], seeds: int, message: str) -> None:
    with pytest.raises((UserError, RecipeError), match=re.escape(message)):
        read_sweep(str(recipe), overrides, seeds)


def test_a_score_needs_to_be_measured(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"^--by score needs scores of validation rows; set evaluation\.generate_every"):
        swept(read_sweep(str(recipe), GRID), by="score")


def results(sweep: Sweep, losses: list[float | None], rows: str = "same") -> list[RunResult]:
    return [
        RunResult(run.name, run.seed, loss, 2, rows="same" if rows == "same" else f"of seed {run.seed}")
        if loss is not None
        else RunResult.failed(run, "full")
        for run, loss in zip(sweep.runs, losses, strict=True)
    ]


def test_mean_and_spread_and_the_choice(recipe: Path) -> None:
    sweep = read_sweep(str(recipe), ["lora.r=2,4,8"], seeds=2)
    found = summarise_sweep(sweep, results(sweep, [3, 5, 2, 4, 0.5, None]))
    assert [each.setting["lora.r"] for each in found.settings] == [4, 2, 8]  # 8 has a failed run
    assert [each.mean("loss") for each in found.settings] == [3, 4, 0.5]
    assert [each.spread("loss") for each in found.settings] == [math.sqrt(2), math.sqrt(2), None]
    assert found.chosen is not None
    assert (found.chosen.name, found.why) == ("r-4_seed-0", "the seed with the lowest validation loss")
    assert found.failures == ["r-8_seed-1: full"]
    own = summarise_sweep(sweep, results(sweep, [3, 5, 4, 2, 6, 7], rows="of the seed"))
    assert own.chosen is not None
    assert (own.chosen.name, own.why) == ("r-4_seed-0", "the first seed, as each seed has validation rows of its own")
    assert summarise_sweep(sweep, results(sweep, [None] * 6)).chosen is None
    nan = summarise_sweep(sweep, results(sweep, [math.nan, 1, 2, 2, 9, 9]))
    assert [each.setting["lora.r"] for each in nan.settings] == [4, 8, 2]


def test_the_highest_score_is_chosen(recipe: Path) -> None:
    sweep = read_sweep(str(recipe), ["lora.r=2,4"])
    found = [
        RunResult(run.name, 0, 1.0, 2, score, rows="x") for run, score in zip(sweep.runs, (50.0, 75.0), strict=True)
    ]
    chosen = summarise_sweep(sweep, found, "score").chosen
    assert chosen is not None
    assert chosen.name == "r-4_seed-0"
    assert SettingResult({}, found).values("score") == [50.0, 75.0]


def shared() -> set[Path]:
    """Return the files of encoded rows, of facts about images, and of features."""
    names = ("encoded", "images", "features")
    return {file for name in names for file in (cache_folder() / name).rglob("*") if file.is_file()}


@pytest.mark.more
def test_a_sweep_stops_goes_on_chooses_and_asks_the_test_rows_once(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two rates with two seeds: one run fails at first, and the sweep is stopped in the third."""
    monkeypatch.setenv("LORA_LLAVA_CACHE", str(tmp_path / "cache"))
    asked: list[str] = []
    evaluate = sweep_results.evaluate
    monkeypatch.setattr(sweep_results, "evaluate", lambda run: asked.append(Path(run).name) or evaluate(run))
    monkeypatch.setattr(scoring, "_evaluate", _never)
    sweep = read_sweep(str(recipe), [*GRID, "training.vision_cache=disk"], seeds=2)
    assert [run.name for run in sweep.runs] == NAMES
    caches: list[set[Path]] = []
    with monkeypatch.context() as patch:
        act_at(1, lambda trainer: _disturb(trainer, caches), patch.setattr)
        with pytest.raises(StoppedError) as caught:
            swept(sweep)
    assert caches[0] == caches[1] == caches[2] != set()
    assert str(caught.value) == f"stopped in run 3 of 4, {NAMES[2]}; run the same command to resume"
    assert caught.value.exit_code == 130
    assert not (sweep.folder / NAMES[1] / "run.json").exists()
    kept = (sweep.folder / NAMES[0] / "metrics.json").read_bytes()

    output = swept(sweep)
    assert "training.learning_rate=0.001: seeds 0, 1, 2 steps each, 1 finished" in output
    assert f"2 settings, 4 runs, 1 finished; 6 steps to train; runs in {sweep.folder}" in output
    assert [line.split(":")[0] for line in output.splitlines() if line.startswith("run ")] == [
        "run 2 of 4",
        "run 3 of 4",
        "run 4 of 4",
    ]
    assert (sweep.folder / NAMES[0] / "metrics.json").read_bytes() == kept
    assert "resume: from" in (sweep.folder / "logs" / f"{NAMES[2]}.txt").read_text()
    losses = {name: json.loads((sweep.folder / name / "metrics.json").read_text())["train"] for name in NAMES}
    means = [statistics.fmean(losses[name]["best_validation_loss"] for name in NAMES[i : i + 2]) for i in (0, 2)]
    figures = json.loads((sweep.folder / "sweep.json").read_text())
    assert [each["mean"] for each in figures["settings"]] == sorted(means)
    best = NAMES[2:] if means[1] < means[0] else NAMES[:2]
    chosen = min(best, key=lambda name: losses[name]["best_validation_loss"])
    assert (figures["chosen"]["run"], figures["test"]["run"], asked) == (chosen, chosen, [chosen])
    assert figures["test"]["table"]["AVG"][2] == 6
    assert [(sweep.folder / name / "predictions.jsonl").exists() for name in NAMES] == [
        name == chosen for name in NAMES
    ]
    page = (sweep.folder / "sweep.html").read_text()
    assert all(name in page for name in NAMES)
    assert "<script" not in page
    assert "the test rows were asked once, for the chosen run" in page

    again = swept(sweep)
    assert "4 runs, 4 finished; 0 steps to train" in again
    assert asked == [chosen]
    changed = read_sweep(str(recipe), [*GRID, "training.vision_cache=disk", "lora.dropout=0.1"], seeds=2)
    with pytest.raises(UserError, match=f"{NAMES[0]} is a run of another recipe; set --output OTHER"):
        swept(changed)


@pytest.mark.more
def test_two_runs_are_compared_and_the_test_rows_asked_once(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(recipe), "training.max_steps=1,2", "--output", str(tmp_path / "out")]
    assert main("sweep", command) == 0
    first = capsys.readouterr().out
    figures = json.loads((tmp_path / "out" / "sweep.json").read_text())
    name = figures["chosen"]["run"]
    losses = {each["runs"][0]["name"]: each["mean"] for each in figures["settings"]}
    assert list(losses) == sorted(losses, key=lambda run: losses[run])
    assert name == next(iter(losses))
    assert "run 1 of 2: max_steps-1_seed-0, 1 step" in first
    assert f"its run: {name} (its only finished run)" in first
    assert "the test rows were asked once, for the chosen run" in first
    predictions = list((tmp_path / "out").rglob("predictions*"))
    assert predictions == [tmp_path / "out" / name / "predictions.jsonl"]
    predictions[0].unlink()
    assert main("sweep", command) == 0
    assert not predictions[0].exists()  # the rows are not asked again
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == figures


def _never(*args: Any) -> Any:
    raise AssertionError("a run of a sweep asks no test rows")


def _disturb(trainer: Any, caches: list[set[Path]]) -> None:
    """Compare the caches of the runs, let the second fail, and stop the third."""
    caches.append(shared())
    if len(caches) == 2:
        raise UserError("the disk is full")
    if len(caches) == 3:
        os.kill(os.getpid(), signal.SIGINT)


def test_a_dry_run_prints_runs_and_steps(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("sweep", [str(recipe), "lora.r=2,4", "--seeds", "3", "--dry-run", "training.max_steps=1,5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        *(
            f"lora.r={r} training.max_steps={steps[0]}: seeds 0, 1, 2, {steps} each"
            for r in (2, 4)
            for steps in ("1 step", "5 steps")
        ),
        f"4 settings, 12 runs, 0 finished; 36 steps to train; runs in {tmp_path}/run-sweep",
    ]
    assert not (tmp_path / "run-sweep").exists()


def test_a_setting_that_cannot_start_is_reported_before_anything_is_trained(recipe: Path, tmp_path: Path) -> None:
    sweep = read_sweep(str(recipe), ["data.max_length=400,16,17"])
    with pytest.raises(UserError) as caught:
        swept(sweep)
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == [
        "data.max_length=16",
        "data.max_length=17",
    ]
    assert not sweep.folder.exists()


def test_a_run_without_figures_is_reported_and_the_others_compared(recipe: Path, tmp_path: Path) -> None:
    sweep = read_sweep(str(recipe), ["lora.r=2,4"], output=str(tmp_path / "out"))
    run = sweep.runs[0]
    Path(run.recipe.output_dir).mkdir(parents=True)
    (Path(run.recipe.output_dir) / "metrics.json").write_text('{"train": {}}')
    stream = io.StringIO()
    found = sweep_runs._result(run, "run 1 of 2", Path(), sweep.folder, Console(file=stream, width=200), train=False)
    assert found.failure is not None
    assert found.failure.startswith(f"{run.recipe.output_dir}/metrics.json cannot be read ('best_validation_loss')")
    assert found.failure in stream.getvalue()


def test_every_time_that_test_rows_were_asked_is_kept(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = read_sweep(str(recipe), ["lora.r=2,4"], output=str(tmp_path / "out"))
    for run in sweep.runs:
        folder = Path(run.recipe.output_dir)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"adapter_sha256": f"of {run.name}", "base": {"name": "x"}}))
        (folder / "adapter_model.safetensors").write_bytes(b"")
    asked: list[str] = []
    monkeypatch.setattr(
        sweep_results, "evaluate", lambda run: asked.append(Path(run).name) or {"AVG": [50.0, 1.0, len(asked)]}
    )

    def ask(*losses: float) -> SweepResult:
        result = ask_test(sweep, summarise_sweep(sweep, results(sweep, list(losses))))
        write_figures(sweep, result)
        return result

    two, four = (run.name for run in sweep.runs)
    assert ask(1, 2).test_note == "the test rows were asked once, for the chosen run"
    assert ask(2, 1).test_note == f"the test rows were asked 2 times; the table is of {four}, chosen before: {two}"
    assert ask(1, 2).test_note == f"the test rows were asked 2 times; the table is of {two}, chosen before: {four}"
    assert asked == [two, four]
    figures = json.loads((sweep.folder / "sweep.json").read_text())
    assert [each["run"] for each in figures["test_asked"]] == asked
    assert (figures["test"]["run"], figures["test"]["table"]["AVG"][2]) == (two, 1)
    (sweep.folder / "sweep.json").write_text("{")
    with pytest.raises(UserError, match=r"sweep\.json cannot be read .*; remove it, and the test rows are asked again"):
        ask(1, 2)


def test_a_misspelt_run_of_stage_1_is_named_once(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "align").mkdir(parents=True)
    (tmp_path / "runs" / "align" / "run.json").write_text("{}")
    start = f"model.start_from={{stage1_run: {tmp_path}/runs/aling}}"
    with pytest.raises(UserError) as caught:
        swept(read_sweep(str(recipe), ["lora.r=2,4", start]))
    meant = f"{tmp_path}/runs/aling does not exist (did you mean {tmp_path}/runs/align?); name "
    assert str(caught.value).startswith(f"model.start_from.stage1_run: {meant}")
    assert "\n" not in str(caught.value)


def test_the_table_of_free_answers_is_titled_once(recipe: Path) -> None:
    sweep = read_sweep(str(recipe), ["lora.r=2,4"])
    table = {"all": {"questions": 24, "exact_match": 75.0, "f1": 75.0, "rouge_l": 75.0, "loss": 0.5}}
    result = replace(summarise_sweep(sweep, results(sweep, [1, 2])), test=table)
    stream = io.StringIO()
    Console(file=stream, width=80).print(*print_sweep(result))
    assert [line.strip() for line in stream.getvalue().splitlines() if "rows" in line] == ["Test rows"]
