"""A small finished run, and a recipe that continues it with the same images under other names and formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_llava.recipe import load_recipe
from tests.own_rows import asked, written
from tests.training.small_runs import run

SUFFIXES = (".bmp", ".tiff", ".webp", ".png")


def painted(number: int) -> Image.Image:
    """An image of its own for every number, with grain that a lossy format would change."""
    torch.manual_seed(number)
    return Image.fromarray(torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8).numpy())


def saved(number: int, file: Path) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    painted(number).save(file, lossless=True) if file.suffix == ".webp" else painted(number).save(file)
    return file.name


def project(folder: Path, content: dict[str, Any], rows: list[dict[str, Any]], **data: Any) -> Path:
    """Write rows and a recipe of them; the images are in `images` beside the rows."""
    written(folder / "rows.json", rows)
    content = content | {
        "output_dir": str(folder / "run"),
        "data": {"format": "conversations", "path": str(folder / "rows.json"), "max_length": 300} | data,
    }
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return folder / "recipe.yaml"


def first_run(folder: Path, parts: Path) -> Path:
    """Train a run over 20 images and 4 questions without an image."""
    rows = [asked(n, saved(n, folder / "images" / f"{n}.png")) for n in range(20)] + [asked(n) for n in range(20, 24)]
    content = {
        "stage": 2,
        "model": {
            "llm": str(parts / "llm"),
            "vision_tower": str(parts / "vision_tower"),
            "start_from": {"untrained": True},
        },
        "lora": {"r": 4, "alpha": 8},
        "training": {"batch_size": 4, "learning_rate": 5e-3, "max_steps": 4, "log_every": 1},
        "evaluation": {"max_new_tokens": 2},
    }
    run(load_recipe(project(folder, content, rows, test_rows=5, validation_rows=3, system_prompt="")))
    return folder


def more(folder: Path, first: Path, **changes: Any) -> Path:
    """Write a recipe that continues the first run with its images under other names and formats, and 16 new ones."""
    order = [*range(20), *range(100, 116)]
    rows = [
        asked(n, saved(n, folder / "images" / f"copy {place}é{SUFFIXES[place % 4]}")) for place, n in enumerate(order)
    ]
    rows += [asked(n) for n in (*range(20, 24), 200, 201)]
    data = {"test_rows": 8, "validation_rows": 5} | changes.pop("data", {})
    content = {
        "stage": 2,
        "model": {"start_from": {"run": str(first / "run")}},
        "lora": {},
        "training": {"batch_size": 4, "learning_rate": 5e-3, "max_steps": 6, "eval_every": 2, "log_every": 1},
        "evaluation": {"max_new_tokens": 2},
    }
    return project(folder, content | changes, rows, **data)
