"""Small rows and images in common formats."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from rich.console import Console


def quiet() -> Console:
    return Console(file=io.StringIO(), width=160)


def asked(number: int, image: str | None = None, answer: str = "Yes.") -> dict[str, Any]:
    turns = [{"from": "human", "value": f"Is it {number}?"}, {"from": "gpt", "value": answer}]
    if image:
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": f"r{number}", "conversations": turns, **({"image": image} if image else {})}


def written(file: Path, rows: list[dict[str, Any]]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows))
    return str(file)


def drawn(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (20, 20), (number * 7 % 256, 90, 30)).save(folder / f"{number}.png")
    return folder


def stored(folder: Path, opened: int, rows_each: int) -> Path:
    """Write a Parquet file with `datasets`, with images in it and several rows per image."""
    images = drawn(folder / "drawn", opened)
    rows = [
        {"image": (images / f"{n}.png").read_bytes(), "question": f"Is it {q}?", "answer": f"{n}"}
        for n in range(opened)
        for q in range(rows_each)
    ]
    table = datasets.Dataset.from_list([row | {"image": {"bytes": row["image"], "path": None}} for row in rows])
    table.cast_column("image", datasets.Image()).to_parquet(folder / "table.parquet")
    return folder / "table.parquet"
