"""Checkpoints: written completely or not at all, and every damage detected."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ends import act_at, damaged_silently, ends_at_every_write, flipped, full
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.core.errors import UserError
from lora_llava.core.storage import file_hash
from lora_llava.recipe import Recipe
from lora_llava.runs.checkpoint import (
    MANIFEST_FILE,
    atomic_checkpoint,
    find_damage,
    list_checkpoints,
    newest_complete,
    read_manifest,
    remove_old,
)
from lora_llava.runs.state_files import load_state, random_state, save_state, set_random_state
from tests.training.small_runs import PulledPlugError, pull_plug, recipe_of, run, same, weights


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two small checkpoints."""
    for step in (1, 2):
        with atomic_checkpoint(tmp_path / f"checkpoint-{step}", {"step": step}) as staging:
            (staging / "inner").mkdir()
            (staging / "inner" / "a.txt").write_text("some text " * step)
            (staging / "b.bin").write_bytes(bytes(range(200)))
    return tmp_path


def test_a_manifest_lists_the_files_of_a_checkpoint(small: Path) -> None:
    manifest = read_manifest(small / "checkpoint-2")
    assert manifest["step"] == 2
    assert {name: output["bytes"] for name, output in manifest["files"].items()} == {"b.bin": 200, "inner/a.txt": 20}
    assert newest_complete(small) == (small / "checkpoint-2", [])
    assert [each.name for each in list_checkpoints(small)] == ["checkpoint-2", "checkpoint-1"]


def test_every_damage_is_detected_and_the_previous_checkpoint_used(small: Path) -> None:
    assert damaged_silently(small) == (12, [])
    (small / "checkpoint-2" / MANIFEST_FILE).write_text("[" * 100_000)
    assert find_damage(small / "checkpoint-2") == "manifest.json has changed since it was written"


def test_no_old_checkpoint_is_removed_if_the_newest_is_damaged(small: Path) -> None:
    flipped(small / "checkpoint-2" / "b.bin")
    with pytest.raises(UserError, match=r"checkpoint-2 is damaged \(b.bin has changed since it was written\)"):
        remove_old(small, 1, None)
    assert len(list_checkpoints(small)) == 2


def test_the_newest_and_the_best_are_kept(small: Path) -> None:
    for step in (3, 4):
        with atomic_checkpoint(small / f"checkpoint-{step}", {"step": step}):
            pass
    (small / ".checkpoint-9.partial").mkdir()
    remove_old(small, 2, str(small / "checkpoint-1"))
    assert sorted(os.listdir(small)) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


def test_a_full_disk_is_reported_before_anything_is_written(small: Path) -> None:
    with pytest.raises(
        UserError, match=r"the disk is full: .*checkpoint-3 needs 1,[\d,]{23} bytes and has [\d,]+ free"
    ):
        with atomic_checkpoint(small / "checkpoint-3", {"step": 3}, needed=10**18):
            raise AssertionError
    assert newest_complete(small) == (small / "checkpoint-2", [])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=4)
    ),
)


@given(state=VALUES)
def test_a_state_is_restored_exactly(state: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("state")
    try:
        save_state(folder, {"state": state})
    except UnicodeEncodeError:  # half a surrogate pair, which no optimizer state has
        return
    assert load_state(folder) == {"state": state}


def test_tensors_and_random_states_are_restored(tmp_path: Path) -> None:
    tensors = {0: torch.randn(3, dtype=torch.bfloat16), "a": (torch.arange(4, dtype=torch.uint8), [torch.tensor(2.5)])}
    save_state(tmp_path, {"tensors": tensors, "random": random_state()})
    drawn = torch.rand(3), np.random.rand(3)
    found = load_state(tmp_path)
    set_random_state(found["random"])
    assert torch.equal(torch.rand(3), drawn[0])
    assert np.array_equal(np.random.rand(3), drawn[1])
    assert found["tensors"][0].dtype == torch.bfloat16
    assert torch.equal(found["tensors"][0], tensors[0])  # type: ignore[arg-type]
    assert torch.equal(found["tensors"]["a"][0], tensors["a"][0])
    with pytest.raises(TypeError, match="contains a set"):
        save_state(tmp_path, {"a": {1}})
    (tmp_path / "state.json").write_text('{"dict": [["a", {"tensor": "99"}]]}')
    with pytest.raises(UserError, match="cannot be read"):
        load_state(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_save_killed_after_any_write_leaves_a_complete_checkpoint(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every nineteenth write here; `python scripts/benchmark.py faults` takes every one."""
    seen: list[tuple[int, str | None]] = []
    act_at(3, lambda trainer: seen.extend(ends_at_every_write(trainer, lambda: os._exit(9), 19)), monkeypatch.setattr)
    run(recipe_of(stage2_content))
    assert len(seen) > 10
    assert {newest for _, newest in seen[:-1]} <= {"checkpoint-2", "checkpoint-3"}
    assert seen[0] == (9, "checkpoint-2")
    assert seen[-1] == (0, "checkpoint-3")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_disk_full_at_any_write_leaves_the_previous_checkpoint(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, str | None]] = []
    act_at(3, lambda trainer: seen.extend(ends_at_every_write(trainer, full, 19)), monkeypatch.setattr)
    recipe = recipe_of(stage2_content)
    run(recipe)
    assert {code for code, _ in seen[:-1]} <= {0, 2}
    assert sum(code == 2 for code, _ in seen) > 10
    assert all(newest == "checkpoint-2" for code, newest in seen if code == 2)


def test_a_full_disk_stops_a_run_with_one_line_and_resume_is_exact(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = recipe_of(stage2_content, max_steps=6)
    run(recipe)
    expected = weights(Path(recipe.output_dir))
    recipe = recipe_of(stage2_content | {"output_dir": str(tmp_path / "other")})
    with monkeypatch.context() as patch:
        act_at(3, lambda trainer: patch.setattr("lora_llava.runs.checkpoint._MARGIN", 10**18), patch.setattr)
        with pytest.raises(UserError, match=r"the disk is full: .*checkpoint-4 needs") as error:
            run(recipe)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("resume with --resume, from " + str(tmp_path / "other/checkpoints/checkpoint-2"))
    output = run(recipe, resume=True)
    assert f"resume: from {tmp_path}/other/checkpoints/checkpoint-2 at step 2\n" in output
    assert same(weights(tmp_path / "other"), expected)


@pytest.fixture
def left_at_6(
    stage2_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Recipe, dict[str, torch.Tensor]]:
    """A run of eight steps that was stopped in the seventh, and the weights of an uninterrupted one."""
    stage2_content["lora"]["dropout"] = 0.1
    stage2_content["output_dir"] = str(tmp_path / "unbroken")
    settings: dict[str, Any] = {
        "max_steps": 8,
        "eval_every": 8,
        "save_every": 2,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "log_every": 3,
        "projector_dropout": 0.1,
    }
    run(recipe_of(stage2_content, **settings))
    stage2_content["output_dir"] = str(tmp_path / "run")
    recipe = recipe_of(stage2_content)
    with monkeypatch.context() as patch:
        act_at(7, pull_plug, patch.setattr)
        with pytest.raises(PulledPlugError):
            run(recipe)
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [each.name for each in checkpoints] == ["checkpoint-6", "checkpoint-4"]
    return recipe, weights(tmp_path / "unbroken")


def test_resume_is_exact_with_dropout_and_logs(
    left_at_6: tuple[Recipe, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    recipe, expected = left_at_6
    run(recipe, resume=True)
    folder = Path(recipe.output_dir)
    assert same(weights(folder), expected)
    folders = (tmp_path / "unbroken", folder)
    before, after = (json.loads((each / "metrics.json").read_text())["train"] for each in folders)
    for key in ("loss_curve", "tokens", "supervised_tokens", "steps", "best_validation_loss"):
        assert after[key] == before[key], key
    assert after["curves"]["learning_rate"] == before["curves"]["learning_rate"]


def test_every_damage_to_a_real_checkpoint_is_detected(left_at_6: tuple[Recipe, dict[str, torch.Tensor]]) -> None:
    recipe, expected = left_at_6
    checkpoints = Path(recipe.output_dir) / "checkpoints"
    tried, unseen = damaged_silently(checkpoints)
    assert unseen == []
    assert tried > 40
    (checkpoints / "checkpoint-6" / "state.safetensors").unlink()
    output = run(recipe, resume=True)
    assert "resume: skipped checkpoint-6: state.safetensors is missing; it is kept as damaged-checkpoint-6\n" in output
    assert (checkpoints / "damaged-checkpoint-6").is_dir()
    assert same(weights(Path(recipe.output_dir)), expected)


def test_a_damaged_checkpoint_does_not_block_later_ones(
    left_at_6: tuple[Recipe, dict[str, torch.Tensor]],
) -> None:
    recipe, expected = left_at_6
    folder = Path(recipe.output_dir)
    (folder / "checkpoints" / "checkpoint-6" / "state.safetensors").unlink()
    sooner = recipe.model_copy(update={"training": recipe.training.model_copy(update={"save_every": 5})})
    run(sooner, resume=True)
    names = sorted(each.name for each in (folder / "checkpoints").iterdir())
    assert names == ["checkpoint-5", "checkpoint-8", "damaged-checkpoint-6"]
    assert same(weights(folder), expected)


def test_an_unreadable_checkpoint_is_skipped(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(file: Path) -> str:
        if file.parent.name == "checkpoint-2":
            raise OSError(errno.EIO, "Input/output error")
        return file_hash(file)

    monkeypatch.setattr("lora_llava.runs.checkpoint.file_hash", unreadable)
    found, skipped = newest_complete(small)
    assert found == small / "checkpoint-1"
    assert skipped == ["checkpoint-2: b.bin cannot be read (Input/output error)"]


def test_a_hidden_file_is_not_damage(small: Path) -> None:
    (small / "checkpoint-2" / ".DS_Store").write_text("x")
    assert newest_complete(small) == (small / "checkpoint-2", [])


def test_no_complete_checkpoint_is_an_error_and_none_has_executable_files(
    left_at_6: tuple[Recipe, dict[str, torch.Tensor]],
) -> None:
    recipe, _ = left_at_6
    found = list_checkpoints(Path(recipe.output_dir) / "checkpoints")
    assert {file.suffix for file in found[0].iterdir()} == {".safetensors", ".json", ".jinja", ".yaml"}
    for each in found:
        (each / MANIFEST_FILE).unlink()
    message = r"no checkpoint is complete \(checkpoint-6: has no manifest.json; checkpoint-4: has no manifest.json\)"
    with pytest.raises(UserError, match=message):
        run(recipe, resume=True)
