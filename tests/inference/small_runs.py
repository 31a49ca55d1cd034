"""Small models for chat."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from lora_llava.model.start import prepare_base
from lora_llava.recipe import ModelSection, StartFrom
from lora_llava.recipe.io import check_recipe
from lora_llava.training.finetune import finetune


def write_base(parts: Path, folder: Path) -> str:
    """Write a complete LLaVA from `parts`, without a chat template, whose answers never end by themselves."""
    section = ModelSection(
        llm=str(parts / "llm"), vision_tower=str(parts / "vision_tower"), start_from=StartFrom(untrained=True)
    )
    shutil.copytree(prepare_base(section, seed=0).folder, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["language_model.lm_head.weight"][2] = 0  # the stop's logit is then 0, and another one is always higher
    save_file(tensors, file, metadata={"format": "pt"})
    return str(folder)


def train_run(folder: Path, parts: Path, scienceqa: Path) -> str:
    """Train a run for one step, with a system prompt."""
    content: dict[str, Any] = {
        "stage": 2,
        "output_dir": str(folder),
        "model": {
            "llm": str(parts / "llm"),
            "vision_tower": str(parts / "vision_tower"),
            "start_from": {"untrained": True},
        },
        "lora": {"r": 4, "alpha": 8},
        "data": {
            "format": "scienceqa",
            "path": str(scienceqa),
            "max_length": 400,
            "system_prompt": "Be brief.",
            "splits": {"train": "test", "validation": None, "test": None},
        },
        "training": {"batch_size": 2, "learning_rate": 1e-3, "max_steps": 1, "log_every": 1},
    }
    finetune(check_recipe(content, "test"), Path(), console=Console(file=io.StringIO(), width=160))
    return str(folder)


def draw_image(file: Path, colour: tuple[int, int, int] = (220, 30, 30)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 24), colour).save(file)
    return file
