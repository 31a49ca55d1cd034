"""Measure seconds and memory of `lora-llava check` on many images of realistic size."""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image, ImageFilter
from rich.console import Console

from lora_llava.prepare.row_check import check
from lora_llava.recipe import load_recipe

_WORDS = "the a red blue dog cat man woman street table holds next to large small two behind"
_DIFFERENT = 300
"""Number of drawn images; the other files repeat them with different trailing bytes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=6_000)


def run(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["LORA_LLAVA_CACHE"] = str(folder / "cache")
        total_bytes = _write(folder, args.images)
        recipe = load_recipe(
            "demo_my_data_qlora.yaml",
            [
                f"data.path={folder}/rows.json",
                f"data.image_folder={folder}/images",
                "data.validation_rows=100",
                "data.max_length=512",
            ],
        )
        first, again = _timed(recipe), _timed(recipe)
    return {
        "images": args.images,
        "size": "640 x 480 JPEG",
        "mean_bytes": total_bytes // args.images,
        "first": first,
        "again": again,
    }


def _timed(recipe: Any) -> dict[str, Any]:
    seen: list[tuple[float, int]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            seen.append((time.monotonic(), psutil.Process().memory_info().rss))

    watcher = threading.Thread(target=watch)
    start = time.monotonic()
    watcher.start()
    report = check(recipe, console=Console(file=io.StringIO()))
    seconds = time.monotonic() - start
    done.set()
    watcher.join()
    half = [rss for when, rss in seen if when < start + seconds / 2]
    return {
        "seconds": round(seconds, 2),
        "errors": len(report.errors),
        "warnings": len(report.warnings),
        "peak_rss_mb_first_half": round(max(half, default=0) / 1e6),
        "peak_rss_mb": round(max(rss for _, rss in seen) / 1e6),
    }


def _write(folder: Path, count: int) -> int:
    (folder / "images").mkdir()
    contents = [_photo(np.random.default_rng(seed)) for seed in range(min(count, _DIFFERENT))]
    rng = random.Random(0)
    words = _WORDS.split()
    rows, total = [], 0
    for index in range(count):
        name = f"{index:06d}.jpg"
        content = contents[index % len(contents)] + b"%d" % index  # after the image's end
        total += len(content)
        (folder / "images" / name).write_bytes(content)
        texts = [" ".join(rng.choices(words, k=rng.randint(5, 40))) for _ in range(4)]
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        turns[0]["value"] = f"{turns[0]['value']}\n<image>"
        rows.append({"id": str(index), "image": name, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return total


def _photo(rng: np.random.Generator) -> bytes:
    """Draw an image with the file size of a photograph: blurred blocks with grain."""
    blocks = (
        Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        .resize((640, 480))
        .filter(ImageFilter.GaussianBlur(3))
    )
    grain = rng.normal(0, 9, (480, 640, 3))
    image = Image.fromarray(np.clip(np.asarray(blocks) + grain, 0, 255).astype(np.uint8))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()
