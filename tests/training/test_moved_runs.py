"""A run is written to its folder, is readable like its siblings, and can be used from a copy."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_llava.commands.main import main
from tests.own_rows import asked, drawn, written


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def project(content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with relative paths beside its rows; it runs in its folder and writes to the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "project"
    drawn(folder / "images", 12)
    written(folder / "rows.json", [asked(n, f"{n}.png") for n in range(12)])
    content |= {
        "output_dir": "~/run",
        "data": {
            "format": "conversations",
            "path": "rows.json",
            "image_folder": "images",
            "validation_rows": 4,
            "max_length": 300,
        },
        "training": content["training"] | {"max_steps": 2, "eval_every": 1},
    }
    (folder / "recipe.yaml").write_text(json.dumps(content))
    monkeypatch.chdir(folder)
    return folder


def test_a_copied_run_is_used_from_anywhere(
    stage2_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: None, capsys: Any
) -> None:
    folder = project(stage2_content, tmp_path, monkeypatch)
    assert main("finetune", ["recipe.yaml"]) == 0
    run = tmp_path / "home" / "run"
    assert not (folder / "~").exists()
    for each in run.rglob("*"):
        assert stat.S_IMODE(each.stat().st_mode) == (0o755 if each.is_dir() else 0o644), each
    assert f"path: {folder}/rows.json" in (run / "recipe.yaml").read_text()
    shutil.copytree(run, tmp_path / "elsewhere" / "copy")
    shutil.rmtree(run)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main("evaluate", ["copy"]) == 0
    assert main("report", ["copy"]) == 0
    assert main("chat", ["copy", "--prompt", "Is it 1?"]) == 0
    assert main("merge", ["copy", "--output=~/merged", "--dtype", "float32"]) == 0
    merged = tmp_path / "home" / "merged"
    for each in (merged, *merged.rglob("*")):
        assert stat.S_IMODE(each.stat().st_mode) == (0o755 if each.is_dir() else 0o644), each
    assert main("evaluate", ["copy", "data.path=~/none.json"]) == 2
    assert f"{tmp_path}/home/none.json is missing" in capsys.readouterr().err


def test_a_run_in_the_home_folder_is_resumed(
    stage2_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(stage2_content, tmp_path, monkeypatch)
    assert main("finetune", ["recipe.yaml"]) == 0
    run = tmp_path / "home" / "run"
    (run / "run.json").unlink()  # as after a kill behind the last checkpoint
    (run / "metrics.json").unlink()
    assert main("finetune", ["recipe.yaml", "--resume"]) == 0
    assert (run / "run.json").is_file()
