"""Builders of caption and box files for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_llava.core.errors import UserError
from lora_llava.synthesis.contexts.context import Box, Context
from lora_llava.synthesis.contexts.reading_contexts import read_contexts

IMAGES = [
    {"id": 7, "file_name": "000000000007.jpg", "width": 640, "height": 480},
    {"id": 3, "file_name": "000000000003.jpg", "width": 300, "height": 300},
    {"id": 9, "file_name": "000000000009.jpg", "width": 10, "height": 10},
]
CATEGORIES = [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 1, "name": "person"}]
CAPTIONS = [(7, "A dog. "), (3, "A man"), (7, "Two\ndogs"), (7, "A dog."), (3, " \t"), (99, "Nobody's")]
BOXES: list[tuple[int, int, list[float], int]] = [
    (7, 18, [64.0, 48.0, 320.0, 240.0], 0),
    (7, 1, [0, 0, 640, 480], 0),
    (7, 1, [0, 0, 640, 480], 1),
    (3, 1, [290.5, -5.0, 100.0, 100.0], 0),
    (3, 1, [300.0, 0.0, 10.0, 10.0], 0),
    (3, 1, [10.0, 10.0, 0.0, 10.0], 0),
    (99, 1, [1.0, 1.0, 2.0, 2.0], 0),
]
THREE = Context("000000000003.jpg", ("A man",), (Box("person", (0.968, 0.0, 1.0, 0.317)),))
SEVEN = Context(
    "000000000007.jpg",
    ("A dog.", "Two dogs"),
    (Box("dog", (0.1, 0.1, 0.6, 0.6)), Box("person", (0.0, 0.0, 1.0, 1.0))),
)


def captions(**more: Any) -> dict[str, Any]:
    rows = [{"image_id": key, "id": number, "caption": text} for number, (key, text) in enumerate(CAPTIONS)]
    return {"info": {"year": 2017}, "images": IMAGES, "annotations": rows} | more


def instances(**more: Any) -> dict[str, Any]:
    rows = [
        {
            "segmentation": [[1.5, 2.0]],
            "iscrowd": crowd,
            "image_id": key,
            "bbox": box,
            "category_id": kind,
            "id": number,
        }
        for number, (key, kind, box, crowd) in enumerate(BOXES)
    ]
    return {"images": IMAGES, "annotations": rows, "categories": CATEGORIES} | more


def save(folder: Path, name: str, content: Any) -> Path:
    file = folder / name
    lines = name.endswith(".jsonl") and isinstance(content, list)
    text = (
        "\n".join(map(json.dumps, content)) if lines else content if isinstance(content, str) else json.dumps(content)
    )
    file.write_text(text, encoding="utf-8")
    return file


def error_of(**given: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_contexts(**given)
    message = str(caught.value)
    assert "\n" not in message
    return message
