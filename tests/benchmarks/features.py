"""Compare batches from cached features with batches from images: samples per second of the collator."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_llava.benchmark.benchmark_rows import shape_config
from lora_llava.data.collator import PackedCollator
from lora_llava.data.images.image_sources import FolderImages, PixelLoader, Pixels
from lora_llava.model.families.tower_families import image_processor_of
from lora_llava.model.vision_cache import CachedFeatures, FeatureStore

REPEATS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read PNG images of 480 x 360 for CLIP ViT-L/14-336, and features of 576 x 1024 in bfloat16 from disk."""
    config = shape_config("7b", 0, 32000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = [f"{index}.png" for index in range(args.images)]
        store = FeatureStore(folder / "features", {})
        store.load()
        for image in names:
            pixels = random.Random(image).randbytes(96 * 72 * 3)
            Image.frombytes("RGB", (96, 72), pixels).resize((480, 360)).save(folder / image)
            store.put(image, torch.randn(576, 1024).to(torch.bfloat16))
        store.flush()
        sources: dict[str, PixelLoader] = {
            "pixels": Pixels(FolderImages(folder, 10**7), image_processor_of(folder, config)),
            "cached": CachedFeatures(store, {image: image for image in names}),
        }
        rates = {key: _rate(PackedCollator(source), names, args.batch_size) for key, source in sources.items()}
    return {
        "images": args.images,
        "batch_size": args.batch_size,
        "samples_per_second": rates,
        "cached_over_pixels": rates["cached"] / rates["pixels"],
    }


def _rate(collator: PackedCollator, names: list[str], batch_size: int) -> float:
    rows = [
        {"input_ids": [32000] * 576 + [5] * 300, "labels": [-100] * 700 + [5] * 176, "image_files": [name]}
        for name in names
    ]
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for first in range(0, len(rows), batch_size):
            collator(rows[first : first + batch_size])
        seconds.append(time.perf_counter() - start)
    return len(rows) / min(seconds)
