"""A good set of images and rows, to which hostile ones are added."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.own_rows import asked
from tests.security.hostile import write_recipe

WriteRows = Callable[..., Path]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        Image.new("RGB", (40, 30 + number), (number * 20, 90, 30)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def write_rows(stage2_content: dict[str, Any], images: Path, tmp_path: Path) -> WriteRows:
    """Writes eight good rows, and more or another file in their place, with a recipe for them."""

    def written(more: Sequence[Any] = (), file: Path | None = None, **data: Any) -> Path:
        rows = [asked(number, f"{number}.png") for number in range(8)]
        path = file or tmp_path / "rows.json"
        if file is None:
            path.write_text(json.dumps([*rows, *more]))
        content = stage2_content | {"evaluation": None}
        content["data"] = {
            "format": "conversations",
            "path": str(path),
            "image_folder": str(images),
            "validation_rows": 2,
            "system_prompt": "",
            "max_length": 300,
            **data,
        }
        return write_recipe(tmp_path / "recipe.yaml", content)

    return written
