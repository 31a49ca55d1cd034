"""Small finished runs with LoRA weights far from zero."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_llava.recipe.io import check_recipe
from lora_llava.training.finetune import finetune

Train = Callable[..., Path]


@pytest.fixture(scope="session")
def train(parts: Path, scienceqa: Path, captions: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function that trains a small run, once for each set of options."""
    done: dict[str, Path] = {}

    def run(stage: int = 2, quantization: str = "nf4", rate: float = 0.05, **lora: Any) -> Path:
        key = f"{stage} {quantization} {rate} {lora}"
        if key not in done:
            folder = tmp_path_factory.mktemp("run") / "run"
            content: dict[str, Any] = {
                "stage": stage,
                "output_dir": str(folder),
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
            finetune(check_recipe(content, "test"), Path(), console=Console(file=io.StringIO(), width=160))
            done[key] = folder
        return done[key]

    return run


@pytest.fixture
def finished(train: Train, tmp_path: Path) -> Path:
    """Copy a QLoRA run that the test may modify."""
    return Path(shutil.copytree(train(), tmp_path / "finished"))
