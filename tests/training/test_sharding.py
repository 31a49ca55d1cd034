"""FSDP2 over two gloo processes matches one process, and its checkpoints are like any other."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_llava.core.errors import UserError
from lora_llava.distributed.sharding import check_sharding
from lora_llava.planning.run_plan import plan_run
from lora_llava.recipe.io import check_recipe
from tests.training.small_runs import FSDP, content_for_ranks, launch, one_and_two, same, weights


@pytest.fixture(
    scope="module", params=[pytest.param("none", marks=pytest.mark.more), pytest.param("nf4", marks=pytest.mark.slow)]
)
def content(parts: Path, scienceqa: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Rows of which half have no image, validated in the middle; unquantized layers are recomputed."""
    content = content_for_ranks(parts, scienceqa, request.param)
    content["training"]["gradient_checkpointing"] = request.param == "none"
    return content


@pytest.fixture(scope="module")
def runs(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Run directories of one process and of two sharded ones, and the output of the two."""
    return one_and_two(content, tmp_path_factory.mktemp("sharded"), FSDP)


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    return dict(json.loads((run / "metrics.json").read_text())["train"]["loss_curve"])


def test_each_process_has_half_of_the_weights(runs: tuple[Path, Path, str]) -> None:
    held, of = re.search(r"this process has ([\d.]+) of ([\d.]+) MB of weights", runs[2]).groups()  # type: ignore[union-attr]
    assert float(held) == pytest.approx(float(of) / 2, rel=0.05)
    plans = [json.loads((each / "metrics.json").read_text())["model"]["freeze_plan"] for each in runs[:2]]
    assert plans[0] == plans[1]
    assert re.search(r"packed (\d+\.\d+), padded \1: equal", runs[2])


def test_the_losses_and_the_adapter_are_those_of_one_process(runs: tuple[Path, Path, str]) -> None:
    one, two = (curves(each) for each in runs[:2])
    assert [len(one[kind]) for kind in ("train", "validation")] == [6, 2]
    for kind in one:
        assert [loss for _, loss in two[kind]] == pytest.approx([loss for _, loss in one[kind]], abs=1e-5)
    expected, found = (weights(each) for each in runs[:2])
    assert found.keys() == expected.keys()
    assert max(float((found[name] - value).abs().max()) for name, value in expected.items()) < 1e-5


@pytest.mark.more
def test_two_sharded_processes_resume_exactly(
    content: dict[str, Any], runs: tuple[Path, Path, str], tmp_path: Path
) -> None:
    if content["model"]["quantization"] == "none":
        pytest.skip("4-bit weights are the harder case, and a run takes time")
    folder = tmp_path / "two"
    shutil.copytree(runs[1], folder)
    (folder / "run.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    result = launch(content, folder, "--resume", environment=FSDP)
    assert result.returncode == 0, result.stderr
    assert same(weights(folder), weights(runs[1]))
    assert curves(folder) == curves(runs[1])


REFUSED = {
    "first version": ({"FSDP_VERSION": "1"}, {}, "FSDP's first version is not supported; add --fsdp_version 2"),
    "answers": ({}, {"evaluation": {}}, "evaluation: answers need the complete model on one GPU"),
    "offload": ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "FSDP's parameter offload has not been tested with this trainer"),
    "recompute": (
        {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
        {},
        "leave --fsdp_activation_checkpointing out; training.gradient_checkpointing does it",
    ),
    "paged": (
        {},
        {"training": {"learning_rate": 1e-3, "optimizer": "paged_adamw_8bit"}},
        "training.optimizer: paged_adamw_8bit cannot update sharded weights; set adamw_torch, or auto",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_not_tested_with_fsdp_are_refused(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    environment, changes, message = REFUSED[name]
    for key, value in (FSDP | environment).items():
        monkeypatch.setenv(key, value)
    recipe = check_recipe(stage2_content | {"evaluation": None} | changes, "test")
    with pytest.raises(UserError) as error:
        check_sharding(recipe, 2)
    assert str(error.value).startswith(message)


def test_fsdp_with_one_process_is_refused(stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="only one was started; start several, or leave FSDP out"):
        plan_run(check_recipe(stage2_content, "test"))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("3", "DeepSpeed's ZeRO-3 shards weights, which 4-bit weights do not support; start with torchrun"),
        ("", "DeepSpeed has not been tested with this trainer; start with torchrun"),
    ],
)
def test_deepspeed_is_refused(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stage: str, message: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    with pytest.raises(UserError) as error:
        plan_run(check_recipe(stage2_content, "test"))
    assert str(error.value).startswith(message)
