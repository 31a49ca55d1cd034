"""The best checkpoint is found by its step in the run's folder, also after a move."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_llava.core.errors import UserError
from lora_llava.recipe.io import check_recipe
from lora_llava.runs.checkpoint import list_checkpoints
from lora_llava.runs.identity import IDENTITY_FILE
from tests.ends import act_at
from tests.training.small_runs import edited, left_at_4, rewritten, run, same, weights

Content = dict[str, Any]


@pytest.mark.parametrize("left", ["at the old path", "nothing"])
def test_the_best_checkpoint_is_found_in_a_moved_run(
    own_content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """Step 2 is the best; at its old place is another run's checkpoint of that step, or nothing."""
    own_content["evaluation"] = None
    recipe = left_at_4(own_content, monkeypatch)
    moved = tmp_path / "moved"

    def best_is_2(folder: Path) -> None:
        edited(folder / "trainer_state.json", lambda each: each.update(best_global_step=2, best_metric=0.0))

    rewritten(tmp_path / "run" / "checkpoints" / "checkpoint-4", best_is_2)
    expected = weights(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    shutil.move(tmp_path / "run", moved)
    if left == "at the old path":
        own_content["seed"] = 5
        left_at_4(own_content, monkeypatch)
        assert not same(weights(tmp_path / "run" / "checkpoints" / "checkpoint-2"), expected)
    run(recipe.model_copy(update={"output_dir": str(moved)}), resume=True)
    assert same(weights(moved), expected)
    assert {each.name for each in list_checkpoints(moved / "checkpoints")} >= {"checkpoint-2", "checkpoint-6"}


def lost(folder: Path) -> str:
    shutil.rmtree(folder)
    return "is missing"


def spoilt(folder: Path) -> str:
    (folder / "adapter_config.json").write_text("{}")
    return r"is damaged \(adapter_config.json has 2 bytes in place of .*\)"


def of_another_run(folder: Path) -> str:
    rewritten(folder, lambda each: edited(each / IDENTITY_FILE, lambda content: content.update(run="another")))
    return "belongs to another run"


@pytest.mark.parametrize("change", [lost, spoilt, of_another_run])
def test_a_missing_best_checkpoint_is_an_error_at_the_start_and_at_the_end(
    own_content: Content, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], str]
) -> None:
    own_content["evaluation"] = None
    recipe = left_at_4(own_content, monkeypatch)
    checkpoints = Path(recipe.output_dir) / "checkpoints"
    rewritten(
        checkpoints / "checkpoint-4",
        lambda folder: edited(
            folder / "trainer_state.json", lambda each: each.update(best_global_step=2, best_metric=0.0)
        ),
    )
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints.parent / "kept")
    problem = change(checkpoints / "checkpoint-2")
    message = (
        rf"{checkpoints}/checkpoint-2, the checkpoint with the lowest validation loss, {problem}; restore it, or run"
    )
    with pytest.raises(UserError, match=f"^{message}"):
        run(recipe, resume=True)
    shutil.rmtree(checkpoints / "checkpoint-2", ignore_errors=True)
    shutil.copytree(checkpoints.parent / "kept", checkpoints / "checkpoint-2")
    with monkeypatch.context() as patch:
        act_at(6, lambda trainer: change(checkpoints / "checkpoint-2"), patch.setattr)
        with pytest.raises(UserError, match=f"^{message}"):
            run(recipe, resume=True)


def test_a_last_step_without_validation_may_be_the_best(own_content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops between the last step and its validation, which has the lowest loss."""
    own_content["evaluation"] = None
    own_content["training"] |= {"eval_every": 3, "save_every": 1, "learning_rate": 1e-4}
    recipe = check_recipe(own_content, "test")
    run(recipe)
    folder = Path(recipe.output_dir)
    expected = weights(folder)
    assert same(weights(folder / "checkpoints" / "checkpoint-6"), expected)

    def not_validated(staging: Path) -> None:
        def change(state: Any) -> None:
            state["log_history"] = [
                each for each in state["log_history"] if each["step"] != 6 or "eval_loss" not in each
            ]
            state.update(best_global_step=None, best_metric=None)

        edited(staging / "trainer_state.json", change)

    rewritten(folder / "checkpoints" / "checkpoint-6", not_validated)
    (folder / "run.json").unlink()
    run(recipe, resume=True)
    metrics = json.loads((folder / "metrics.json").read_text())["train"]
    assert [step for step, _ in metrics["loss_curve"]["validation"]] == [3, 6]
    assert metrics["best_validation_loss"] == metrics["loss_curve"]["validation"][-1][1]
    assert same(weights(folder), expected)
