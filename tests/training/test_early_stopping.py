"""`training.early_stopping`: where a run stops, what it keeps and says, and the same after a resume."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lora_llava.core.errors import StoppedError
from lora_llava.model.start import RUN_FILE
from lora_llava.recipe import RecipeError
from lora_llava.recipe.io import check_recipe
from lora_llava.runs.directory import METRICS_FILE
from lora_llava.training.callbacks import count_without_fall
from tests.ends import act_at
from tests.training.small_runs import recipe_of, run, same, weights

REASON = "the validation loss has not fallen by more than 1 in 2 validations"
STOPPING = {"eval_every": 1, "max_steps": 6, "early_stopping": {"patience": 2, "min_delta": 1}}
"""The first loss counts as a fall, the next two do not: the run stops at step 3."""


@pytest.mark.parametrize(
    ("losses", "min_delta", "count"),
    [
        ([], 0, 0),
        ([3], 0, 0),
        ([3, 2, 1], 0, 0),
        ([3, 3], 0, 1),
        ([3, 2, 2.5, 2.1], 0, 2),
        ([3, 2, 2.5, 1.9], 0, 0),
        ([3, 2.9, 2.8, 2.7], 0.25, 0),  # 2.7 is below 3 by 0.3
        ([3, 2.9, 2.8], 0.25, 2),
        ([float("nan"), float("nan")], 0, 2),
        ([2, float("nan"), 1], 0, 0),
    ],
)
def test_validations_without_a_fall_are_counted(losses: list[float], min_delta: float, count: int) -> None:
    assert count_without_fall(losses, min_delta) == count


def test_a_run_stops_and_says_what_it_kept(stage2_content: dict[str, Any]) -> None:
    recipe = recipe_of(stage2_content, **STOPPING)
    output, folder = run(recipe), Path(recipe.output_dir)
    train = json.loads((folder / METRICS_FILE).read_text())["train"]
    losses = dict(map(tuple, train["loss_curve"]["validation"]))
    assert list(losses) == [1, 2, 3]
    kept = min(losses, key=lambda step: losses[step])
    assert (train["steps"], train["planned_steps"], train["kept_step"]) == (3, 6, kept)
    assert (train["best_validation_loss"], train["stopped_early"]) == (losses[kept], REASON)
    assert same(weights(folder), weights(folder / "checkpoints" / f"checkpoint-{kept}"))
    lines = output.splitlines()
    assert f"stopped early at step 3 of 6: {REASON}" in lines
    assert any(
        line.endswith(f"; kept the checkpoint of step {kept}, validation loss {losses[kept]:.4f}") for line in lines
    )
    page = (folder / "report.html").read_text()
    assert f"<dt>steps</dt><dd>3 of 6, stopped early: {REASON}</dd>" in page
    assert f"<dt>kept</dt><dd>step {kept}, validation loss {losses[kept]:.4f}</dd>" in page

    (folder / RUN_FILE).unlink()  # as if it had been killed after the last checkpoint
    (folder / METRICS_FILE).unlink()
    trained = weights(folder)
    again = run(recipe, resume=True)
    assert f"stopped early at step 3 of 6: {REASON}" in again.splitlines()
    assert json.loads((folder / METRICS_FILE).read_text())["train"]["loss_curve"] == train["loss_curve"]
    assert same(weights(folder), trained)


def test_a_run_stopped_before_the_last_validation_resumes_to_the_same_end(
    stage2_content: dict[str, Any], tmp_path: Path
) -> None:
    expected = recipe_of(stage2_content, **STOPPING)
    run(expected)
    recipe = expected.model_copy(update={"output_dir": str(tmp_path / "stopped")})
    with pytest.MonkeyPatch.context() as patch:  # resumes with the validation of step 3, which ends it
        act_at(3, lambda trainer: os.kill(os.getpid(), signal.SIGINT), patch.setattr)
        with pytest.raises(StoppedError):
            run(recipe)
    run(recipe, resume=True)
    folders = [Path(each.output_dir) for each in (expected, recipe)]
    found = [json.loads((folder / METRICS_FILE).read_text())["train"] for folder in folders]
    for key in ("steps", "kept_step", "stopped_early", "best_validation_loss", "loss_curve"):
        assert found[1][key] == found[0][key], key
    assert same(*map(weights, folders))


@pytest.mark.more
def test_a_run_whose_loss_falls_trains_all_steps(stage2_content: dict[str, Any]) -> None:
    recipe = recipe_of(stage2_content, **STOPPING | {"early_stopping": {"patience": 6}, "max_steps": 3})
    output = run(recipe)
    train = json.loads((Path(recipe.output_dir) / METRICS_FILE).read_text())["train"]
    assert (train["steps"], train["planned_steps"], train["stopped_early"]) == (3, 3, None)
    assert "stopped early" not in output


@pytest.mark.parametrize(
    ("training", "data", "problem"),
    [
        ({"eval_every": None}, {}, "training.eval_every; set it"),
        ({}, {"splits": {"validation": None}}, "validation rows; set data.validation_rows"),
        ({"eval_every": None}, {"splits": {"validation": None}}, "validation rows; set data.validation_rows"),
    ],
)
def test_early_stopping_needs_validations(
    stage2_content: dict[str, Any], training: dict[str, Any], data: dict[str, Any], problem: str
) -> None:
    stage2_content["training"] |= {"early_stopping": {"patience": 1}} | training
    stage2_content["data"] |= data
    with pytest.raises(RecipeError) as caught:
        check_recipe(stage2_content, "r.yaml")
    message = f"training.early_stopping counts validations and needs {problem}, or drop early_stopping"
    assert str(caught.value) == f"r.yaml: {message}"


def test_a_number_in_place_of_the_section_names_what_was_meant(stage2_content: dict[str, Any]) -> None:
    stage2_content["training"]["early_stopping"] = 3
    with pytest.raises(RecipeError, match=r"early_stopping is 3; it should be a section with keys \(did you mean \{pa"):
        check_recipe(stage2_content, "r.yaml")
