"""`lora-llava sweep --trials`: a search that stops and resumes with the same trials, and what is refused."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_llava.commands.main import main
from lora_llava.core.errors import StoppedError, UserError
from lora_llava.recipe import RecipeError
from lora_llava.training.sweep import search as sweep_search
from lora_llava.training.sweep.grid import SweepRun, read_sweep
from lora_llava.training.sweep.search import Search, TrialBook, read_search
from lora_llava.training.sweep.sweep_runs import run_search
from tests.ends import act_at
from tests.training import test_sweep

recipe = test_sweep.recipe

SPACE = ["training.learning_rate=1e-4..1e-2:log", "lora.r=2,4", "training.max_steps=1..3"]


def searched(search: Search, value: Callable[[SweepRun], float], stop_at: int = 99) -> list[dict[str, Any]]:
    """Return the settings of a search whose results are a rule's; stop before a setting has its result."""
    book, found = TrialBook(search, "loss"), []
    for place, (run,) in enumerate(book.settings()):
        found.append(dict(run.setting))
        if place == stop_at:
            break
        book.record(place, value(run))
    return found


def test_a_stopped_search_has_the_same_trials(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    rule: Callable[[SweepRun], float] = lambda run: abs(math.log10(run.setting["training.learning_rate"]) + 3)  # noqa: E731
    whole = searched(read_search(str(recipe), SPACE, 7, output=str(tmp_path / "whole")), rule)
    assert len(whole) == 7
    search = read_search(str(recipe), SPACE, 7, output=str(tmp_path / "stopped"))
    assert searched(search, rule, stop_at=5) == whole[:6]
    assert searched(search, rule) == whole
    assert searched(read_search(str(recipe), SPACE, 8, output=str(tmp_path / "stopped")), rule)[:7] == whole
    for each in whole:
        assert list(each) == [text.partition("=")[0] for text in SPACE]
        assert 1e-4 <= each["training.learning_rate"] <= 1e-2
        assert each["lora.r"] in (2, 4)
        assert each["training.max_steps"] in (1, 2, 3)
    other = read_search(str(recipe), [*SPACE, "seed=5"], 7, output=str(tmp_path / "other"))
    assert searched(other, rule)[0] != whole[0]
    assert other.values.runs({"lora.r": "2"}, "trial-1_")[0].name == "trial-1_r-2_seed-5"


def test_a_search_names_no_setting_twice_and_ends_when_none_is_left(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    search = read_search(str(recipe), ["training.max_steps=1..2"], 3, output=str(tmp_path / "few"))
    assert sorted(each["training.max_steps"] for each in searched(search, lambda run: 1.0)) == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "trials", "message"),
    [
        (["lora.r=8"], 3, "--trials needs values to choose from; add lora.r=8,16,32 or "),
        (["lora.r=2,4"], 2, "--trials 2: the lists have only 2 combinations; drop --trials to train all of them"),
        (["lora.r=8..4"], 3, "lora.r=8..4: the range is empty; write the lower number first"),
        (
            ["lora.dropout=0..0.5:log"],
            3,
            "lora.dropout=0..0.5:log: a range by the logarithm starts above 0; raise 0.0 ",
        ),
        (["lora.r=2..4,8"], 3, "override 'lora.r=2..4,8': a range is given alone; write lora.r=LOW..HIGH, or list"),
        (["lora.dropout=0.0..1.5"], 3, "lora.dropout is 1.5; it should be less than 1"),
        (["seed=0..9"], 3, "seed is not searched; set --seeds N for N seeds of each trial"),
        (["lora.r=2..4"], None, "lora.r=2..4 is a range; add --trials N to search it, or list values: lora.r=VALUE,"),
    ],
)
def test_a_search_that_is_refused(recipe: Path, overrides: list[str], trials: int | None, message: str) -> None:
    pytest.importorskip("optuna")
    with pytest.raises((UserError, RecipeError), match=re.escape(message)):
        read_sweep(str(recipe), overrides) if trials is None else read_search(str(recipe), overrides, trials)


def test_a_search_in_the_folder_of_another_is_refused(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    folder = str(tmp_path / "out")
    TrialBook(read_search(str(recipe), ["lora.r=2..4"], 3, output=folder), "loss")
    with pytest.raises(UserError, match=r"has a search with another range or list: lora\.r=2\.\.4; set --output OTHER"):
        TrialBook(read_search(str(recipe), ["lora.r=2..8"], 3, output=folder), "loss")
    with pytest.raises(UserError, match="has a search with another --by: loss; set --output OTHER"):
        TrialBook(read_search(str(recipe), ["lora.r=2..4"], 3, output=folder), "score")
    (tmp_path / "out" / "trials.log").write_text('{"op_code": 99}\nnothing\n')
    with pytest.raises(UserError, match=r"trials\.log cannot be read .*; remove it: finished runs are kept"):
        TrialBook(read_search(str(recipe), ["lora.r=2..4"], 3, output=folder), "loss")


def test_a_search_without_optuna(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_search, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--trials needs Optuna: pip install 'lora_llava\[optuna\]'; or list values "):
        read_search(str(recipe), SPACE, 3)


def test_a_dry_run_of_a_search(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    assert main("sweep", [str(recipe), "training.max_steps=1..3", "--trials", "2", "--seeds", "2", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "search training.max_steps=1..3",
        f"2 trials, seeds 0, 1, 1 to 3 steps each; runs in {tmp_path}/run-sweep",
    ]
    assert not (tmp_path / "run-sweep").exists()


@pytest.mark.more
def test_a_search_stops_goes_on_and_asks_the_test_rows_once(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    search = read_search(str(recipe), ["training.learning_rate=1e-4..1e-2:log", "training.max_steps=1,2"], 3)

    def run() -> str:
        stream = io.StringIO()
        run_search(search, Path(), Console(file=stream, width=200))
        return stream.getvalue()

    caches: list[set[Path]] = [set()]  # the first run fails, the second is stopped
    with monkeypatch.context() as patch:
        act_at(1, lambda trainer: test_sweep._disturb(trainer, caches), patch.setattr)
        with pytest.raises(StoppedError, match=r"stopped in trial 2 of 3, trial-2_.*; run the same command to resume"):
            run()
    output = run()
    names = [line.split(": ")[1] for line in output.splitlines() if line.startswith("trial ")]
    assert [name.split("_")[0] for name in names] == ["trial-1", "trial-2", "trial-3"]
    figures = json.loads((search.folder / "sweep.json").read_text())
    losses = {
        name: json.loads((search.folder / name / "metrics.json").read_text())["train"]["best_validation_loss"]
        for name in names
    }
    assert figures["chosen"]["run"] == min(losses, key=lambda name: losses[name])
    assert [each["run"] for each in figures["test_asked"]] == [figures["chosen"]["run"]]
    kept = [trial.value for trial in TrialBook(search, "loss")._study.trials]
    assert kept == list(losses.values())
    assert "trial 1" not in run()
    assert json.loads((search.folder / "sweep.json").read_text()) == figures
