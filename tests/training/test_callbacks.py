"""Stop a run on a signal, a non-finite value or another failure, and resume it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import TrainerControl, TrainerState

from lora_llava.core.errors import StoppedError, UserError
from lora_llava.data.images.image_sources import Pixels
from lora_llava.recipe import Recipe, dump_recipe
from lora_llava.recipe.io import check_recipe
from lora_llava.runs.checkpoint import list_checkpoints, newest_complete
from lora_llava.training import stages
from lora_llava.training.callbacks import PoisonedError, RefuseNaN, SaveEvery, StopOnSignal, WarnOfSpikes
from tests.forked import start, wait_for
from tests.training.small_runs import recipe_of, run, same, weights


def checkpoints_of(recipe: Recipe) -> Path:
    return Path(recipe.output_dir) / "checkpoints"


UNBROKEN: dict[str, Path] = {}
"""Run directories of uninterrupted runs by recipe."""


def unbroken(content: dict[str, Any], tmp_path: Path) -> Path:
    """Return an uninterrupted run of the same recipe."""
    key = json.dumps(content | {"output_dir": ""}, sort_keys=True)
    if key not in UNBROKEN:
        recipe = check_recipe(content | {"output_dir": str(tmp_path / "unbroken")}, "test")
        run(recipe)
        UNBROKEN[key] = Path(recipe.output_dir)
    return UNBROKEN[key]


def expected_of(content: dict[str, Any], tmp_path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the uninterrupted run."""
    return weights(unbroken(content, tmp_path))


def act_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Call a function at the end of a step of the next run."""
    ended = StopOnSignal.on_step_end

    def on_step_end(self: StopOnSignal, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            act()
        ended(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_step_end", on_step_end)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_leaves_a_checkpoint_and_no_result(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, code: int
) -> None:
    recipe = recipe_of(stage2_content, max_steps=6, eval_every=4)
    handlers = [signal.getsignal(getattr(signal, each)) for each in ("SIGINT", "SIGTERM", "SIGHUP")]
    with monkeypatch.context() as patch:
        act_at(patch, 3, lambda: os.kill(os.getpid(), getattr(signal, name)))
        with pytest.raises(StoppedError, match=r"stopped at step [34] of 6; a checkpoint is in .*--resume") as error:
            run(recipe)
    assert error.value.exit_code == code
    assert [signal.getsignal(getattr(signal, each)) for each in ("SIGINT", "SIGTERM", "SIGHUP")] == handlers
    assert newest_complete(checkpoints_of(recipe))[0] in [checkpoints_of(recipe) / f"checkpoint-{n}" for n in (3, 4)]
    assert not {"run.json", "adapter_model.safetensors", "metrics.json"} & set(os.listdir(recipe.output_dir))
    run(recipe, resume=True)
    assert same(weights(Path(recipe.output_dir)), expected_of(stage2_content, tmp_path))


def test_a_signal_during_validation_loses_nothing(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The best checkpoint is at the step of the signal, which is known only after the run resumes."""
    recipe = recipe_of(stage2_content, max_steps=4, eval_every=2, learning_rate=0.15, share_images="off")
    with monkeypatch.context() as patch:
        act_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(StoppedError):
            run(recipe)
    run(recipe, resume=True)
    expected = expected_of(stage2_content, tmp_path)
    folders = Path(recipe.output_dir), unbroken(stage2_content, tmp_path)
    found, before = (json.loads((folder / "metrics.json").read_text())["train"] for folder in folders)
    assert len(before["loss_curve"]["validation"]) == 2
    assert before["best_validation_loss"] == before["loss_curve"]["validation"][0][1]
    for key in ("loss_curve", "best_validation_loss", "tokens"):
        assert found[key] == before[key]
    assert same(weights(Path(recipe.output_dir)), expected)


def test_a_run_stopped_after_the_last_step_is_finished_by_a_resume(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = recipe_of(stage2_content, max_steps=4, eval_every=4)
    with monkeypatch.context() as patch:
        act_at(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(StoppedError, match="stopped at step 4 of 4"):
            run(recipe)
    assert not (Path(recipe.output_dir) / "run.json").exists()
    run(recipe, resume=True)
    assert same(weights(Path(recipe.output_dir)), expected_of(stage2_content, tmp_path))


def test_a_signal_during_a_gather_is_handled_at_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop, state, control = StopOnSignal(), TrainerState(max_steps=9), TrainerControl()

    def gather(value: Any) -> list[Any]:
        stop._on_signal(signal.SIGTERM, None)
        return [value]

    with monkeypatch.context() as patch:
        patch.setattr("lora_llava.training.callbacks.gather", gather)
        stop.on_step_end(None, state, control)
    assert not control.should_training_stop
    stop.on_step_end(SimpleNamespace(), state, control)
    assert control.should_training_stop


def test_a_second_ctrl_c_stops_at_once_with_a_complete_last_checkpoint(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(stage2_content)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    act_at(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    assert newest_complete(checkpoints_of(recipe)) == (checkpoints_of(recipe) / "checkpoint-2", [])


@pytest.mark.slow
def test_sigterm_from_outside_stops_within_a_step_and_two_seconds(
    stage2_content: dict[str, Any], tmp_path: Path
) -> None:
    """As SLURM sends it before it stops a job."""
    recipe = recipe_of(stage2_content, max_steps=2000, eval_every=2000, save_every=3)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    process = start(["finetune", str(file)])
    wait_for(lambda: bool(list_checkpoints(checkpoints_of(recipe))))
    assert process.pid is not None
    sent = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 143
    assert time.monotonic() - sent < 10  # the README has the figure of an idle machine
    assert newest_complete(checkpoints_of(recipe))[1] == []


def poisoned(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Replace the pixels of an image with NaN."""
    given = Pixels.__call__

    def pixels(self: Pixels, names: Any) -> Any:
        found = given(self, names)
        for each, values in zip(names, found, strict=True):
            if each == name:
                values.fill_(float("nan"))
        return found

    monkeypatch.setattr(Pixels, "__call__", pixels)


def test_a_poisoned_image_stops_in_its_step_and_is_named(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(stage2_content, batch_size=2, gradient_accumulation=2, save_every=1, max_steps=6)
    with monkeypatch.context() as patch:
        poisoned(patch, "train/7/image.png")
        with pytest.raises(PoisonedError) as error:
            run(recipe)
    message = str(error.value)
    assert error.value.exit_code == 3
    assert "(train/7/image.png)" in message
    assert "the loss is not a number (NaN or infinite); the weights were not updated and nothing was saved" in message
    step = int(message.removeprefix("step ").partition(":")[0])
    newest, skipped = newest_complete(checkpoints_of(recipe))
    assert skipped == []
    if step == 1:
        assert newest is None
        return
    assert newest == checkpoints_of(recipe) / f"checkpoint-{step - 1}"
    assert all(value.isfinite().all() for value in weights(newest).values())


def test_a_gradient_that_is_not_finite_stops_the_run_too(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(stage2_content, save_every=1, eval_every=4)
    built = stages.build_trainer

    def build(*args: Any) -> Any:
        trainer, stop, spikes = built(*args)
        _, parameter = next((n, p) for n, p in trainer.model.named_parameters() if "lora_A" in n)

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * (float("inf") if trainer.state.global_step == 2 else 1.0)

        parameter.register_hook(spoil)
        return trainer, stop, spikes

    monkeypatch.setattr(stages, "build_trainer", build)
    with pytest.raises(PoisonedError, match="step 3: the gradient is not a number"):
        run(recipe)
    assert newest_complete(checkpoints_of(recipe)) == (checkpoints_of(recipe) / "checkpoint-2", [])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_is_named_and_resume_is_exact(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scienceqa: Path, workers: int
) -> None:
    shutil.copytree(scienceqa, tmp_path / "data")
    stage2_content["data"]["path"] = str(tmp_path / "data")
    recipe = recipe_of(stage2_content, max_steps=6 + 4 * workers, eval_every=6, save_every=None, workers=workers)
    images = tmp_path / "data" / "images" / "train"
    with monkeypatch.context() as patch:
        act_at(patch, 3, lambda: images.rename(tmp_path / "away"))
        with pytest.raises(
            UserError, match=r"^image train/\d+/image.png is missing; resume with --resume, from .*-[3-8]$"
        ):
            run(recipe)
    (tmp_path / "away").rename(images)
    run(recipe, resume=True)
    assert same(weights(Path(recipe.output_dir)), expected_of(stage2_content, tmp_path))


def test_out_of_memory_names_the_fix_and_leaves_a_checkpoint(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = recipe_of(stage2_content, max_steps=5, eval_every=5)

    def end() -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        act_at(patch, 4, end)
        with pytest.raises(
            UserError, match=r"set training.memory_gb=.*; resume with --resume, from .*checkpoint-[34]$"
        ):
            run(recipe)
    run(recipe, resume=True)
    assert same(weights(Path(recipe.output_dir)), expected_of(stage2_content, tmp_path))


def raise_in_update(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Run out of memory in an update, after some of the weights were changed."""
    update = torch.optim.AdamW.step
    updates = 0

    def broken(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        nonlocal updates
        updates += 1
        if updates < step:
            return update(self, *args, **kwargs)
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1.0)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)


def test_partly_updated_weights_are_not_saved(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = recipe_of(stage2_content, max_steps=4, eval_every=4, save_every=None)
    with monkeypatch.context() as patch:
        raise_in_update(patch, 3)
        with pytest.raises(UserError, match=r"; no checkpoint exists to resume from$"):
            run(recipe)
    assert list_checkpoints(checkpoints_of(recipe)) == []
    run(recipe)
    assert same(weights(Path(recipe.output_dir)), expected_of(stage2_content, tmp_path))


def test_tokens_of_a_failed_step_are_counted_once(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = recipe_of(stage2_content, max_steps=4, eval_every=4, log_every=4, gradient_accumulation=2)
    compute = stages.LlavaSFTTrainer.compute_loss
    passes = 0

    def broken(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 6:  # the second of the third step
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return compute(self, model, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(stages.LlavaSFTTrainer, "compute_loss", broken)
        with pytest.raises(UserError, match=r"from .*checkpoint-2$"):
            run(recipe)
    run(recipe, resume=True)
    expected = expected_of(stage2_content, tmp_path)
    assert same(weights(Path(recipe.output_dir)), expected)
    folders = Path(recipe.output_dir), unbroken(stage2_content, tmp_path)
    found, before = (json.loads((folder / "metrics.json").read_text())["train"] for folder in folders)
    for key in ("loss_curve", "tokens", "supervised_tokens"):
        assert found[key] == before[key], key


def test_with_several_ranks_only_the_rows_of_the_loss_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lora_llava.training.callbacks.gather", lambda own: [own, ("loss", ["bad row"]), None])
    watch, model = RefuseNaN(lambda number: [f"good row {number}"], 1), torch.nn.Linear(1, 1)
    watch.losses.append(torch.tensor(1.0))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    with pytest.raises(PoisonedError, match=r"the loss is not a number .* Look at its rows: bad row; "):
        watch.on_pre_optimizer_step(None, TrainerState(), None, model=model)


def test_a_killed_worker_is_reported_and_resume_is_exact(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(stage2_content, max_steps=24, eval_every=24, save_every=6, workers=1)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    process = start(["finetune", str(file)])
    wait_for(lambda: bool(list_checkpoints(checkpoints_of(recipe))))
    for loader in psutil.Process(process.pid).children():
        loader.kill()
    process.join(60)
    assert process.exitcode == 2
    assert not (Path(recipe.output_dir) / "run.json").exists()
    run(recipe, resume=True)
    assert same(weights(Path(recipe.output_dir)), expected_of(stage2_content, tmp_path))


def test_a_loss_spike_is_reported_and_training_continues() -> None:
    watch, state = WarnOfSpikes(), TrainerState()
    for step in range(1, 31):
        state.global_step = step
        watch.on_log(None, state, TrainerControl(), {"loss": 9.1 if step == 25 else 3.0})
        watch.on_log(None, state, TrainerControl(), {"eval_loss": 99.0})
    assert watch.steps == [25]


def test_checkpoints_are_saved_by_steps_or_minutes() -> None:
    now = 0.0

    def clock() -> float:
        return now

    for settings, expected in (((4, None), [4, 8]), ((None, 1.0), [3, 6, 9]), ((None, None), [])):
        saving, saved = SaveEvery(*settings, clock), []
        state = TrainerState()
        now = 0.0
        saving.on_train_begin(None, state, None)
        for step in range(1, 11):
            now, state.global_step, control = now + 25, step, TrainerControl()
            saving.on_step_end(None, state, control)
            if control.should_save:
                saved.append(step)
                saving.on_save(None, state, control)
        assert saved == expected


@pytest.mark.parametrize("value", [0, -1, "10", "ten min", "1.5.2 min", 2.5])
def test_an_invalid_save_interval_is_refused(stage2_content: dict[str, Any], value: Any) -> None:
    with pytest.raises(UserError, match=r"training.save_every"):
        recipe_of(stage2_content, save_every=value)
