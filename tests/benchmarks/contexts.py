"""Measure seconds and peak memory of a process that reads the contexts of many images and plans all tasks."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil

FEW = 10_000
"""Number of images in a first run, which shows the memory that does not grow."""
SAMPLE_SECONDS = 0.01
CAPTIONS, BOXES, CROWD = 5, 7, 0.01
"""Captions and boxes per image, about as in COCO's train2017 (118,287 images, 591,753 captions, 860,001 annotations),
and the share of boxes that are crowd regions."""
POLYGON = 54
"""Numbers per segmentation, so that annotations are as long as COCO's, whose 860,001 have 448 MB."""
READ = """
import json, sys
from pathlib import Path
from lora_llava.synthesis.contexts.reading_contexts import read_contexts
from lora_llava.synthesis.tasks import plan_tasks
contexts = read_contexts(**{name: Path(file) for name, file in json.loads(sys.argv[1]).items()})
tasks = plan_tasks(contexts, samples_per_image=3, seed=0)
print(json.dumps({"report": str(contexts.report), "tasks": len(tasks)}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run a process for each file format, on few images and on all."""
    runs = []
    for form, write in (("llava", write_llava), ("coco", write_coco)):
        for count in sorted({min(FEW, args.images), args.images}):
            with tempfile.TemporaryDirectory() as folder:
                files = write(Path(folder), count, Random(args.seed))
                megabytes = round(sum(file.stat().st_size for file in files.values()) / 1e6, 1)
                runs.append({"form": form, "images": count, "megabytes": megabytes} | _run(files))
    return {"captions": CAPTIONS, "boxes": BOXES, "seed": args.seed, "runs": runs}


def _run(files: dict[str, Path]) -> dict[str, Any]:
    given = json.dumps({name: str(file) for name, file in files.items()})
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", READ, given], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):  # it may end during the reading
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
        time.sleep(SAMPLE_SECONDS)
    seconds = round(time.perf_counter() - start, 2)
    if process.returncode:
        raise RuntimeError(f"reading ended with {process.returncode}")
    output = json.loads(process.communicate()[0])
    return {"seconds": seconds, "peak_rss_mb": round(peak / 1e6, 1), **output}


def write_llava(folder: Path, count: int, random: Random) -> dict[str, Path]:
    """Write LLaVA's JSONL."""
    file = folder / "contexts.jsonl"
    with file.open("w") as stream:
        for number in range(count):
            boxes = [{"category": f"object {kind}", "bbox": corners(random)} for kind in kinds(random)]
            row = {
                "id": f"{number:012}",
                "image": f"{number:012}.jpg",
                "captions": captions(random),
                "instances": boxes,
            }
            stream.write(json.dumps(row) + "\n")
    return {"contexts": file}


def write_coco(folder: Path, count: int, random: Random) -> dict[str, Path]:
    """Write COCO's two files, with the boxes of an image far apart and the category names at the end."""
    images = [
        {
            "license": 3,
            "file_name": f"{number:012}.jpg",
            "coco_url": f"http://images.example/train2017/{number:012}.jpg",
            "height": 480,
            "width": 640,
            "date_captured": "2013-11-14 11:18:45",
            "id": number,
        }
        for number in range(count)
    ]
    texts = ({"image_id": n, "id": n, "caption": text} for n in range(count) for text in captions(random))
    files = {"captions": folder / "captions.json", "instances": folder / "instances.json"}
    _write(files["captions"], {"images": images}, texts, {})
    categories = [{"supercategory": "object", "id": kind, "name": f"object {kind}"} for kind in range(80)]
    _write(files["instances"], {"images": images}, _instances(count, random), {"categories": categories})
    return files


def _instances(count: int, random: Random) -> Iterator[dict[str, Any]]:
    polygons = [[round(random.uniform(0, 640), 2) for _ in range(POLYGON)] for _ in range(100)]
    for time_ in range(BOXES):
        for number in range(count):
            x1, y1, x2, y2 = corners(random)
            box = [round(value, 2) for value in (x1 * 640, y1 * 480, (x2 - x1) * 640, (y2 - y1) * 480)]
            yield {
                "segmentation": [random.choice(polygons)],
                "area": 2765.1486500000005,
                "iscrowd": int(random.random() < CROWD),
                "image_id": number,
                "bbox": box,
                "category_id": random.randrange(80),
                "id": time_ * count + number,
            }


def _write(file: Path, before: dict[str, Any], annotations: Iterator[Any], after: dict[str, Any]) -> None:
    with file.open("w") as stream:
        stream.write(json.dumps({"info": {"year": 2017}, **before})[:-1] + ', "annotations": [')
        for number, annotation in enumerate(annotations):
            stream.write((", " if number else "") + json.dumps(annotation))
        stream.write("]" + "".join(f', "{key}": {json.dumps(value)}' for key, value in after.items()) + "}")


def captions(random: Random) -> list[str]:
    """Return captions of COCO's length: 10 words, 52 characters."""
    return [" ".join(f"{random.randrange(10**4):04}" for _ in range(10)) + " ." for _ in range(CAPTIONS)]


def kinds(random: Random) -> list[int]:
    return [random.randrange(80) for _ in range(BOXES)]


def corners(random: Random) -> list[float]:
    x1, y1 = random.uniform(0, 0.8), random.uniform(0, 0.8)
    return [round(value, 3) for value in (x1, y1, x1 + 0.1 + random.random() / 10, y1 + 0.1 + random.random() / 10)]
