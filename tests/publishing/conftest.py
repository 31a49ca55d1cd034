"""Small finished runs with LoRA weights far from zero."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_llava.publishing.merge import merge
from lora_llava.recipe.io import check_recipe
from lora_llava.training.finetune import finetune
from tests.once import once

Train = Callable[..., Path]


@pytest.fixture(scope="session")
def train(parts: Path, scienceqa: Path, captions: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function that trains a small run, once for each set of options."""

    def run(stage: int = 2, quantization: str = "nf4", rate: float = 0.05, **lora: Any) -> Path:
        content: dict[str, Any] = {
            "stage": stage,
            "model": {
                "llm": str(parts / "llm"),
                "vision_tower": str(parts / "vision_tower"),
                "start_from": {"untrained": True},
                "quantization": quantization,
            },
            "lora": {"r": 4, "alpha": 32, **lora},
            "data": {"format": "scienceqa", "path": str(scienceqa), "max_length": 400, "system_prompt": ""},
            "training": {"batch_size": 8, "learning_rate": rate, "max_steps": 4, "log_every": 1}
            | {"share_images": "off"},
            "evaluation": {"max_new_tokens": 4},
        }
        if stage == 1:
            del content["lora"], content["evaluation"]
            content["data"] = {"format": "captions", "path": str(captions), "template": "plain", "max_length": 400}

        def write(folder: Path) -> None:
            recipe = check_recipe(content | {"output_dir": str(folder / "run")}, "test")
            finetune(recipe, Path(), console=Console(file=io.StringIO(), width=160))

        return once(tmp_path_factory, _name("run", stage, quantization, rate, lora), write) / "run"

    return run


def _name(*parts: Any) -> str:
    return re.sub(r"[^\w.]+", "_", " ".join(map(str, parts))).strip("_")


@pytest.fixture(scope="session")
def merge_once(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, str]]:
    """Return a function that merges a small run with weights in float32, once for each set of the run's options.

    It returns the folder of the model, which no test may change, and what was printed.
    """

    def merged(**options: Any) -> tuple[Path, str]:
        def write(folder: Path) -> None:
            stream = io.StringIO()
            merge(train(**options), folder / "merged", dtype="float32", console=Console(file=stream, width=160))
            (folder / "output.txt").write_text(stream.getvalue())

        folder = once(tmp_path_factory, _name("merged", options), write)
        return folder / "merged", (folder / "output.txt").read_text()

    return merged


@pytest.fixture
def finished(train: Train, tmp_path: Path) -> Path:
    """Copy a QLoRA run that the test may modify."""
    return Path(shutil.copytree(train(), tmp_path / "finished"))
