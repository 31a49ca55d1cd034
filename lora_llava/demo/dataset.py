"""Data sets of the demo: ScienceQA's layout, captions in `chat.json`, small shapes, contexts, and an example."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from lora_llava.core.errors import UserError
from lora_llava.core.storage import make_entry
from lora_llava.demo import corpus, questions
from lora_llava.demo.questions import Row
from lora_llava.demo.small_shapes import ORDINARY, SMALL_SCENES, write_small_shapes
from lora_llava.demo.world import Split, caption, draw, draw_with_boxes, random_scene

SEED = 7
ROWS = {"train": 4000, "val": 160, "test": 480}
CAPTIONS = 6000
CONTEXTS = 300
EXAMPLE_IMAGES = 20
VISUAL_SHARE = 0.6
_VERSION = 1
"""Increase it when the same counts would produce different rows."""


def build_demo_scienceqa(cache: Path, rows: dict[str, int] | None = None) -> Path:
    """Build the ScienceQA-like data set, unless the cache has it.

    Args:
        cache: Cache folder.
        rows: Number of rows of each split; None sets those of the demo.

    Returns:
        A folder with `problems.json`, `pid_splits.json`, `images/{split}/{id}/image.png`, and `scenes.json`, which
        describes what each image shows. No scene and no question of one split occurs in another.
    """
    rows = rows or ROWS
    name = f"scienceqa-v{_VERSION}-{'-'.join(str(count) for count in rows.values())}"
    return _once(cache / "demo" / name, lambda folder: _write_scienceqa(folder, rows))


def build_demo_captions(cache: Path, count: int = CAPTIONS) -> Path:
    """Build images of the training split with their captions, unless the cache has them.

    Returns:
        Path of a `chat.json`; its images are in the folder `images` next to it.
    """
    folder = _once(cache / "demo" / f"captions-v{_VERSION}-{count}", lambda folder: _write_captions(folder, count))
    return folder / "chat.json"


def build_demo_small(cache: Path, split: str) -> Path:
    """Build the large images with small shapes and their questions, unless the cache has them.

    Args:
        cache: Cache folder.
        split: Split to return.

    Returns:
        Path of the split's JSON file in LLaVA's form; its images are in the folder `images` next to it.

    Raises:
        UserError: If the split is unknown.
    """
    splits = (*SMALL_SCENES, ORDINARY)
    if split not in splits:
        raise UserError(f"demo_small has no split {split!r}; it has {', '.join(splits)}")
    return _once(cache / "demo" / f"small-v{_VERSION}", write_small_shapes) / f"{split}.json"


def build_demo_contexts(cache: Path, count: int = CONTEXTS) -> Path:
    """Build images of the training split with captions and boxes, unless the cache has them.

    Returns:
        Path of a `contexts.jsonl` in LLaVA's form; its images are in the folder `images` next to it.
    """
    folder = _once(cache / "demo" / f"contexts-v{_VERSION}-{count}", lambda folder: _write_contexts(folder, count))
    return folder / "contexts.jsonl"


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    make_entry(folder, write)
    return folder


def _write_scienceqa(folder: Path, rows: dict[str, int]) -> None:
    rng = random.Random(SEED)
    problems: dict[str, Row] = {}
    splits: dict[str, list[str]] = {}
    scenes: dict[str, str] = {}
    seen: set[str] = set()
    for split, count in rows.items():
        splits[split] = []
        while len(splits[split]) < count:
            pid = str(len(problems) + 1)
            row, scene = _draw_row(rng, cast(Split, split), folder / "images" / split / pid, seen)
            if row is not None:
                problems[pid] = row
                scenes |= {pid: scene} if scene else {}
                splits[split].append(pid)
    (folder / "problems.json").write_text(json.dumps(problems, indent=1))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    (folder / "scenes.json").write_text(json.dumps(scenes))


def _draw_row(rng: random.Random, split: Split, image_folder: Path, seen: set[str]) -> tuple[Row | None, str]:
    """Draw one row and its image; returns the row, or None for a repeated text-only question, and the scene's key."""
    if rng.random() < VISUAL_SHARE:
        scene = random_scene(rng, split)
        row = rng.choice(questions.VISUAL)(scene, rng)
        image_folder.mkdir(parents=True)
        draw(scene, rng).save(image_folder / "image.png")
        return row | {"image": "image.png", "split": split}, scene.key
    row = rng.choice(questions.TEXTUAL)(rng)
    key = json.dumps([row["question"], row["hint"], row["choices"]])
    if key in seen:
        return None, ""
    seen.add(key)
    return row | {"split": split}, ""


def _write_captions(folder: Path, count: int) -> None:
    rng = random.Random(SEED + 1)
    rows: list[dict[str, Any]] = []
    (folder / "images").mkdir(parents=True)
    for index in range(count):
        scene = random_scene(rng, "train")
        name = f"{index:05d}.png"
        draw(scene, rng).save(folder / "images" / name)
        request = rng.choice(corpus.DESCRIBE)
        rows.append(
            {
                "id": f"{index:05d}",
                "image": name,
                "conversations": [
                    {"from": "human", "value": f"{request}\n<image>"},
                    {"from": "gpt", "value": caption(scene)},
                ],
            }
        )
    (folder / "chat.json").write_text(json.dumps(rows))


def _write_contexts(folder: Path, count: int) -> None:
    rng = random.Random(SEED + 3)
    rows = []
    (folder / "images").mkdir(parents=True)
    for index in range(count):
        scene, name = random_scene(rng, "train"), f"{index:05d}.png"
        image, boxes = draw_with_boxes(scene, rng)
        image.save(folder / "images" / name)
        instances = [
            {"category": f"{thing.colour} {thing.shape}", "bbox": [round(corner, 3) for corner in box]}
            for thing, box in zip(scene.things, boxes, strict=True)
        ]
        rows.append({"id": f"{index:05d}", "image": name, "captions": [caption(scene)], "instances": instances})
    (folder / "contexts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_example_folder(folder: Path, images: int = EXAMPLE_IMAGES) -> None:
    """Write an example of a user's folder: images, and a CSV file of questions about them.

    Args:
        folder: A new or empty folder.
        images: Number of images.

    Raises:
        UserError: If the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name a new folder for the example")
    rng = random.Random(SEED + 2)
    (folder / "images").mkdir(parents=True)
    seen: set[str] = set()
    with (folder / "questions.csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(("image", "question", "answer"))
        while len(seen) < images:
            scene = random_scene(rng, "train")
            if scene.key in seen:
                continue
            seen.add(scene.key)
            name = f"{len(seen):02d}.png"
            draw(scene, rng).save(folder / "images" / name)
            table.writerows((name, question, answer) for question, answer in questions.plain_questions(scene))
