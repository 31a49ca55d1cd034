"""float16 with loss scaling, as on a T4: skipped steps are counted, and a resume is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from lora_llava.runs.checkpoint import list_checkpoints
from lora_llava.runs.state_files import load_state
from lora_llava.training import stages
from lora_llava.training.callbacks import PoisonedError, RefuseNaN
from tests.ends import act_at
from tests.training.small_runs import PulledPlugError, pull_plug, recipe_of, run, same, weights


@pytest.fixture
def float16(stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe in float16 with NF4 and dropout, whose loss scale soon grows until gradients overflow."""
    built = stages.build_trainer

    def build(*args: Any) -> Any:
        found = built(*args)
        found[0].accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
        return found

    monkeypatch.setattr(stages, "build_trainer", build)
    stage2_content["model"] = stage2_content["model"] | {"dtype": "float16", "quantization": "nf4"}
    stage2_content["lora"]["dropout"] = 0.1
    return stage2_content


def test_steps_that_overflow_are_skipped_and_counted_and_a_resume_is_exact(
    float16: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(float16 | {"output_dir": str(tmp_path / "unbroken")}, max_steps=7, eval_every=7, save_every=4)
    assert "dtype: float16 with loss scaling\n" in run(recipe)
    printed = capsys.readouterr().out
    recipe = recipe_of(float16)
    with monkeypatch.context() as patch:
        act_at(5, pull_plug, patch.setattr)
        with pytest.raises(PulledPlugError):
            run(recipe)
    saved = load_state(list_checkpoints(Path(recipe.output_dir) / "checkpoints")[0])
    run(recipe, resume=True)
    assert same(weights(Path(recipe.output_dir)), weights(tmp_path / "unbroken"))
    folders = (tmp_path / "unbroken", Path(recipe.output_dir))
    before, after = (json.loads((folder / "metrics.json").read_text())["train"] for folder in folders)
    assert after["loss_curve"] == before["loss_curve"]
    skipped = before["overflows"]
    assert after["overflows"] == skipped
    assert min(skipped) <= 4 < max(skipped)
    assert saved["counters"]["overflows"] == [step for step in skipped if step <= 4]
    assert (saved["scaler"]["growth_interval"], saved["scaler"]["scale"]) == (2, expected_scale(skipped, 4))
    rates = [rate for _, rate in before["curves"]["learning_rate"]]
    assert all(rates[step] == rates[step - 1] for step in skipped if step < 7)  # no step of the schedule either
    listed = ", ".join(map(str, skipped))
    assert f"loss scaling skipped {len(skipped)} of 7 steps, whose gradients were too large: {listed}\n" in printed


def expected_scale(skipped: list[int], steps: int) -> float:
    """Return the scale after some steps: half after each that was skipped, double after two others in a row."""
    scale, good = 2.0**20, 0
    for step in range(1, steps + 1):
        scale, good = (scale / 2, 0) if step in skipped else (scale, good + 1)
        scale, good = (scale * 2, 0) if good == 2 else (scale, good)
    return scale


@pytest.mark.parametrize(("scale", "loss", "blamed"), [(1.0, 0.5, "gradient"), (2.0**16, float("nan"), "loss")])
def test_what_scaling_cannot_fix_stops_the_run(scale: float, loss: float, blamed: str) -> None:
    class Scaled:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    watch, model = RefuseNaN(lambda number: [f"row {number}"], 1), torch.nn.Linear(1, 1)
    watch.losses.append(torch.tensor(loss))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    with pytest.raises(PoisonedError, match=f"the {blamed} is not a number .*float16, whose largest value is 65,504"):
        watch.on_pre_optimizer_step(None, TrainerState(), None, model=model, optimizer=Scaled())
    assert watch.overflows == []
