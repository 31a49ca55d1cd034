"""A folder with images of different sizes, and recipes of both stages of a LLaVA-1.6 made of the demo's parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.own_rows import asked, written

GRID = [[64, 128], [128, 64], [128, 128]]
SIZES = {"wide.png": (60, 140), "high.png": (190, 62), "square.png": (130, 128), "small.png": (7, 9)}
KEY = "base_model.model.model.image_newline"


def write_images_and_rows(folder: Path) -> Path:
    """Write images of noise, captions of them, and questions about them and about no image."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    for name, size in SIZES.items():
        Image.fromarray(generator.integers(0, 255, (*size, 3), np.uint8)).save(folder / "images" / name)
    names = list(SIZES)
    written(
        folder / "captions.json",
        [asked(number, names[number % 4], f"a red square number {number}.") for number in range(16)],
    )
    rows = [asked(number, names[number % 4], f"Number {number}.") for number in range(8)]
    written(folder / "rows.json", rows + [asked(100 + number) for number in range(4)])
    return folder


def stage1_of_demo(folder: Path, output: Path, **training: Any) -> dict[str, Any]:
    """Content of a Stage 1 recipe of the demo's parts, packed."""
    return {
        "stage": 1,
        "output_dir": str(output),
        "model": {
            "llm": "demo",
            "vision_tower": "demo",
            "high_resolution": {"grid": GRID},
            "start_from": {"untrained": True},
            "quantization": "none",
        },
        "data": {
            "format": "captions",
            "path": str(folder / "captions.json"),
            "image_folder": str(folder / "images"),
            "template": "plain",
            "max_length": 200,
            "validation_rows": 2,
        },
        "training": {"learning_rate": 5e-3, "max_tokens_per_row": 300, "max_steps": 6, "eval_every": 2} | training,
    }


def stage2_of_demo(folder: Path, output: Path, **start: Any) -> dict[str, Any]:
    """Content of a Stage 2 recipe of the same parts."""
    content = stage1_of_demo(folder, output)
    data = {"format": "conversations", "path": str(folder / "rows.json"), "template": "vicuna_v1", "system_prompt": ""}
    return content | {
        "stage": 2,
        "model": content["model"] | {"start_from": start},
        "lora": {"r": 4, "alpha": 8},
        "data": content["data"] | data,
        "training": content["training"] | {"max_steps": 2},
    }
