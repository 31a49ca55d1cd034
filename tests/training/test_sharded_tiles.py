"""FSDP2 over two processes trains a LLaVA-1.6 as one process does, its newline too."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lora_llava.recipe.io import check_recipe
from tests.training.assembled_tiles import KEY, stage1_of_demo, stage2_of_demo, write_images_and_rows
from tests.training.small_runs import FSDP, launch, one_and_two, run, same, weights

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images_and_rows(tmp_path_factory.mktemp("sharded"))


def largest_difference(one: Path, two: Path) -> float:
    expected, found = weights(one), weights(two)
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


def test_stage_1_trains_rows_with_and_without_images(folder: Path, tmp_path: Path) -> None:
    """A rank whose row has no image would wait forever for the others if its pass had no gradient in the layers."""
    content = stage1_of_demo(folder, folder / "unused")
    content["data"] |= {"format": "conversations", "path": str(folder / "rows.json"), "template": "vicuna_v1"}
    content["training"] = {"learning_rate": 1e-3, "batch_size": 1, "epochs": 1, "log_every": 1}
    content.pop("output_dir")
    one, two, _ = one_and_two(content, tmp_path, FSDP)
    assert KEY in weights(two)
    assert largest_difference(one, two) < 1e-5


def test_stage_2_carries_the_newline_and_resumes(folder: Path, tmp_path: Path) -> None:
    run(check_recipe(stage1_of_demo(folder, tmp_path / "stage1", max_steps=2), "test"))
    content = stage2_of_demo(folder, folder / "unused", stage1_run=str(tmp_path / "stage1"))
    content["training"] = {"learning_rate": 1e-3, "batch_size": 1, "max_steps": 3, "eval_every": 2, "log_every": 1}
    content.pop("output_dir")
    one, two, _ = one_and_two(content, tmp_path, FSDP)
    assert torch.equal(weights(two)[KEY], weights(tmp_path / "stage1")[KEY])
    assert largest_difference(one, two) < 1e-5
    shutil.copytree(two, tmp_path / "again")
    (tmp_path / "again" / "run.json").unlink()
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "checkpoint-3")
    done = launch(content, tmp_path / "again", "--resume", environment=FSDP)
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "again"), weights(two))
