"""Small runs, in this process or by the script with or without a launcher."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lora_llava.recipe import Recipe, dump_recipe
from lora_llava.recipe.io import check_recipe
from lora_llava.runs.checkpoint import MANIFEST_FILE, atomic_checkpoint, list_checkpoints
from lora_llava.training import finetune
from tests.ends import act_at
from tests.forked import run_ranks

SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune.py"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""Set by `accelerate launch --use_fsdp --fsdp_version 2`."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def recipe_of(content: dict[str, Any], **training: Any) -> Recipe:
    """Return a recipe without evaluation, with the given training settings."""
    content["evaluation"] = None
    content["training"] |= training
    return check_recipe(content, "test")


def run(recipe: Recipe, **options: Any) -> str:
    """Train in this process and return the output."""
    stream = io.StringIO()
    finetune.finetune(recipe, Path(), console=Console(file=stream, width=400), **options)
    return stream.getvalue()


class PulledPlugError(Exception):
    """An error that no handler catches."""


def pull_plug(trainer: Any) -> None:
    """Stop a run with an error that it does not handle."""
    raise PulledPlugError


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the LoRA and projector weights of a run or checkpoint."""
    return load_file(folder / "adapter_model.safetensors")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Check whether two sets of weights are bit-equal."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def content_for_ranks(parts: Path, scienceqa: Path, quantization: str = "none") -> dict[str, Any]:
    """Return a recipe with one sample per row, half without image; its last step has one sample for two ranks."""
    return {
        "stage": 2,
        "model": {
            "llm": str(parts / "llm"),
            "vision_tower": str(parts / "vision_tower"),
            "quantization": quantization,
            "start_from": {"untrained": True},
        },
        "lora": {"r": 4, "alpha": 8},
        "data": {"format": "scienceqa", "path": str(scienceqa), "max_length": 400, "system_prompt": ""},
        "training": {"batch_size": 1, "learning_rate": 1e-3, "epochs": 0.45, "eval_every": 3, "log_every": 1},
    }


def one_and_two(
    content: dict[str, Any], folder: Path, environment: Mapping[str, str] | None = None, torchrun: bool = False
) -> tuple[Path, Path, str]:
    """Train with one process and with two, with equally many samples per step.

    Args:
        content: The recipe of the two processes.
        folder: The folder of both runs.
        environment: Environment variables of the two processes.
        torchrun: Start the two by torchrun.

    Returns:
        The run directories of one and of two processes, and the output of the two.
    """
    alone = content | {"training": content["training"] | {"gradient_accumulation": 2}}
    run(check_recipe(alone | {"output_dir": str(folder / "one")}, "test"))
    two = launch(content, folder / "two", environment=environment, torchrun=torchrun)
    assert two.returncode == 0, two.stderr
    return folder / "one", folder / "two", two.stdout + two.stderr


def launch(
    content: Mapping[str, Any],
    folder: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    torchrun: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run `scripts/finetune.py` in two processes.

    Args:
        content: The recipe, without `output_dir`.
        folder: The run directory; the recipe is written beside it.
        options: Options of the script.
        environment: Variables added to those of this process.
        torchrun: Start them by torchrun, whose three processes import everything again.
    """
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(dump_recipe(check_recipe({**content, "output_dir": str(folder)}, "test")))
    added = {"COLUMNS": "120", **(environment or {})}
    if not torchrun:
        return run_ranks(SCRIPT, [str(recipe), *options], 2, added)
    command = [*TORCHRUN, str(SCRIPT), str(recipe), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | added)


def left_at_4(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Make a run that was stopped in its fifth step of six."""
    recipe = check_recipe(content, "test")
    with monkeypatch.context() as patch:
        act_at(5, pull_plug, patch.setattr)
        with pytest.raises(PulledPlugError):
            run(recipe)
    assert list_checkpoints(Path(recipe.output_dir) / "checkpoints")[0].name == "checkpoint-4"
    return recipe


def edited(file: Path, change: Callable[[Any], None]) -> None:
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))


def rewritten(checkpoint: Path, change: Callable[[Path], Any]) -> None:
    """Change a checkpoint and update its manifest."""
    about = {"step": int(checkpoint.name.split("-")[1])}
    with atomic_checkpoint(checkpoint, about) as staging:
        shutil.copytree(checkpoint, staging, dirs_exist_ok=True)
        (staging / MANIFEST_FILE).unlink()
        change(staging)
