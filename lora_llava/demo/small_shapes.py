"""The demo of high resolution: the demo's shapes on images six times as large as its vision tower's.

Scaled down to the tower's 64 pixels, a shape is a coloured dot of three to five pixels; in a tile it is as large as
those that the tower was trained with. All shapes have the same area, so that the dot does not say which shape it was.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

from lora_llava.demo.world import COLOURS, SHAPES, Scene, Split, Thing, draw_large

GRIDS = ((4, 12), (12, 4))
"""Rows and columns of places of a wide and of a tall image: 128 x 384 and 384 x 128 pixels."""
SMALL_SCENES = {"train": 1200, "val": 40, "test": 120}
"""Images of each split; each has five questions."""
_SEED = 11


def small_scenes(rng: random.Random, split: Split, count: int) -> list[Scene]:
    """Draw scenes of five things with the five colours and the five shapes, each once.

    In every five scenes, each colour has each shape once: any rule that answers by the question alone gets one question
    in five right.

    Args:
        rng: Source of randomness.
        split: Split of the scenes.
        count: Number of scenes, a multiple of five.
    """
    colours, places = list(COLOURS), range(GRIDS[0][0] * GRIDS[0][1])
    scenes: list[Scene] = []
    while len(scenes) < count:
        shapes = rng.sample(SHAPES, len(SHAPES))
        for turn in range(len(shapes)):
            scenes.append(_placed(rng, split, colours, shapes[turn:] + shapes[:turn], places))
    rng.shuffle(scenes)
    return scenes


def _placed(rng: random.Random, split: Split, colours: list[str], shapes: list[str], places: range) -> Scene:
    """Draw places for these things until the scene belongs to the split."""
    while True:
        things = zip(rng.sample(places, len(shapes)), colours, shapes, strict=True)
        scene = Scene(tuple(sorted(Thing(*thing) for thing in things)))
        if scene.split == split:
            return scene


def small_questions(scene: Scene) -> list[tuple[str, str]]:
    """Return a question about the shape of each thing, and its answer."""
    return [(f"Which shape is {thing.colour}?", thing.shape) for thing in scene.things]


def write_small_shapes(folder: Path, scenes: dict[str, int] | None = None) -> None:
    """Write `train.json`, `val.json` and `test.json` in LLaVA's form, and `images/{split}/{number}.png`.

    Args:
        folder: A new or empty folder.
        scenes: Number of images of each split, multiples of five; None sets those of the demo.
    """
    rng = random.Random(_SEED)
    for split, count in (scenes or SMALL_SCENES).items():
        rows: list[dict[str, Any]] = []
        (folder / "images" / split).mkdir(parents=True)
        for number, scene in enumerate(small_scenes(rng, cast(Split, split), count)):
            name = f"{split}/{number:04d}.png"
            draw_large(scene, rng, rng.choice(GRIDS)).save(folder / "images" / name)
            rows += [_row(f"{split}-{number:04d}-{n}", name, *each) for n, each in enumerate(small_questions(scene))]
        (folder / f"{split}.json").write_text(json.dumps(rows))


def _row(name: str, image: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}
