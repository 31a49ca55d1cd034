"""FSDP2 over two gloo processes trains what one process trains, and its checkpoints are like any other."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.launched import LAUNCHER, finetune

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""As `accelerate launch --use_fsdp --fsdp_version 2` sets them."""


@pytest.fixture(scope="module")
def content(parts: Path, scienceqa: Path) -> dict[str, Any]:
    """Packed rows, half the samples without picture, layers recomputed; validated in the middle."""
    return {
        "stage": 2,
        "model": {
            "llm": str(parts / "llm"), "vision_tower": str(parts / "vision_tower"), "quantization": "none",
            "start_from": {"untrained": True},
        },
        "lora": {"r": 4, "alpha": 8},
        "data": {"format": "scienceqa", "path": str(scienceqa), "max_length": 400, "system_prompt": ""},
        "training": {
            "batch_size": 1, "learning_rate": 1e-3, "epochs": 0.45, "eval_every": 3, "log_every": 1,
            "gradient_checkpointing": True,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Run directories of one process and of two that share the weights, and what the two said."""
    folder = tmp_path_factory.mktemp("sharded")
    alone = content | {"training": content["training"] | {"gradient_accumulation": 2}}
    one, two = finetune(alone, folder / "one", []), finetune(content, folder / "two", LAUNCHER, environment=FSDP)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    return folder / "one", folder / "two", two.stdout + two.stderr


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    return dict(json.loads((run / "metrics.json").read_text())["train"]["loss_curve"])


def test_each_process_holds_half(runs: tuple[Path, Path, str]) -> None:
    held, of = re.search(r"this process holds ([\d.]+) of ([\d.]+) MB of weights", runs[2]).groups()  # type: ignore[union-attr]
    assert float(held) == pytest.approx(float(of) / 2, rel=0.05)
    assert re.search(r"packed (\d+\.\d+), padded \1: equal", runs[2])


def test_the_losses_and_the_adapter_are_those_of_one_process(runs: tuple[Path, Path, str]) -> None:
    one, two = (curves(run) for run in runs[:2])
    assert [len(one[kind]) for kind in ("train", "validation")] == [6, 2]
    for kind in one:
        assert [loss for _, loss in two[kind]] == pytest.approx([loss for _, loss in one[kind]], abs=1e-5)
    expected, found = (load_file(run / "adapter_model.safetensors") for run in runs[:2])
    assert found.keys() == expected.keys()
    assert max(float((found[name] - value).abs().max()) for name, value in expected.items()) < 1e-5


def test_two_that_share_go_on_as_if_there_was_no_stop(
    content: dict[str, Any], runs: tuple[Path, Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "two"
    shutil.copytree(runs[1], folder)
    (folder / "run.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    result = finetune(content, folder, LAUNCHER, "--resume", environment=FSDP)
    assert result.returncode == 0, result.stderr
    expected, found = (load_file(run / "adapter_model.safetensors") for run in (runs[1], folder))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert curves(folder) == curves(runs[1])
