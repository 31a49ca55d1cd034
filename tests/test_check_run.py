"""A misspelt run folder, a run in progress and an unfinished one, in every verb that takes a run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.model.start import RUN_FILE
from lora_llava.model.weights.names import ADAPTER_FILE
from lora_llava.recipe.io import RECIPE_FILE
from lora_llava.runs.check_run import check_run, in_progress
from lora_llava.runs.directory import METRICS_FILE

VERBS = [
    ["chat", "{}", "--prompt", "x"],
    ["chat", "{}", "--web"],
    ["evaluate", "{}"],
    ["merge", "{}", "--output", "merged"],
    ["push", "{}", "me/it", "--dry-run"],
    ["report", "{}"],
    ["compare", "{}"],
]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with `runs/first` and `runs/second_try`."""
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second_try"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        for file in (RUN_FILE, ADAPTER_FILE, METRICS_FILE, RECIPE_FILE):
            (tmp_path / "runs" / name / file).write_text("{}")
    return tmp_path / "runs"


def unfinished(runs: Path, name: str = "third") -> Path:
    (runs / name / "checkpoints" / "checkpoint-12").mkdir(parents=True)
    (runs / name / RECIPE_FILE).write_text("{}")
    return runs / name


def problem(path: str, **settings: bool) -> str:
    with pytest.raises(UserError) as caught:
        check_run(path, **settings)
    return str(caught.value)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: f"{verb[0]}{verb[-1]}")
def test_every_verb_names_the_run_that_was_meant(
    runs: Path, verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished(runs)
    found = []
    for path in ("runs/frist", "runs/third"):
        assert main(argv=[part.format(path) for part in verb]) == 2
        found.append(capsys.readouterr().err)
    assert found[0].startswith("error: runs/frist does not exist (did you mean runs/first?); name a ")
    assert found[1] == (
        "error: runs/third is an unfinished run, whose last checkpoint is checkpoint-12; finish it with the command "
        "that started it and --resume\n"
    )


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("runs/First", "runs/first"),
        ("runs/second-try", "runs/second_try"),
        ("runs/second", "runs/second_try"),
        ("runs\\second_try2", "runs/second_try"),
        ("frist", "runs/first"),
        ("first", "runs/first"),
        ("run/first", "runs/first"),
        ("runs/frist/", "runs/first"),
    ],
)
def test_a_misspelt_run_is_found(runs: Path, path: str, meant: str) -> None:
    for hub in (False, True):
        assert problem(path, hub=hub) == f"{path} does not exist (did you mean {meant}?); name a run directory"


def test_a_path_that_resembles_no_run(runs: Path) -> None:
    listed = "name a run directory, such as runs/first, runs/second_try"
    assert problem("runs/zzzz") == f"runs/zzzz does not exist; {listed}"
    assert problem("runs/zzzz", hub=True) == f"runs/zzzz does not exist; {listed}"
    assert problem("zzzz", hub=True) == f"zzzz does not exist; {listed}"
    assert problem("/nowhere/zzzz") == "/nowhere/zzzz does not exist; name a run directory"
    check_run("llava-hf/llava-1.5-7b-hf", hub=True)
    check_run("runs/first")


def test_places_that_are_not_a_run_itself(runs: Path) -> None:
    unfinished(runs)
    assert problem("runs") == "runs is a folder of runs; name one: runs/first, runs/second_try, runs/third"
    inside = "runs/third/checkpoints/checkpoint-12"
    assert problem(inside) == f"{inside} is a part of a run; name its folder, runs/third"
    assert problem("runs/first/run.json") == "runs/first/run.json is a part of a run; name its folder, runs/first"


def test_a_run_in_progress(runs: Path) -> None:
    folder = unfinished(runs)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = {"process": other.pid, "host": platform.node(), "since": "2026-01-02 03:04:05"}
    (folder / ".lock.json").write_text(json.dumps(owner))
    who = f"process {other.pid} on {platform.node()}, since 2026-01-02 03:04:05"
    assert in_progress(folder) == who
    assert problem("runs/third") == f"runs/third is a run in progress ({who}); wait until it has finished"
    other.communicate(b"\n")
    assert in_progress(folder) is None  # it ended without removing the file
    assert problem("runs/third").startswith("runs/third is an unfinished run")
    (folder / ".lock.json").write_text(json.dumps(owner | {"process": os.getpid()}))
    assert in_progress(folder) is None
