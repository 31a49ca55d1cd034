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

GRIDS = ((2, 12), (12, 2))
"""Rows and columns of places of a wide and of a tall image: 64 x 384 and 384 x 64 pixels."""
SMALL_SCENES = {"train": 1200, "val": 40, "test": 120}
"""Large images of each split; each has five questions."""
ORDINARY = "ordinary"
"""Split of images of the tower's size, with three questions each: what a model without tiles has learnt."""
ORDINARY_SCENES = {"train": 400, ORDINARY: 100}
"""Images of the tower's size that are trained besides the large ones, and those of the split of their own."""
_SEED = 11


def small_scenes(rng: random.Random, split: Split, count: int, things: int = 5, places: int = 24) -> list[Scene]:
    """Draw scenes of things of different colours and shapes.

    In every five scenes, each colour that is there has each shape once: any rule that answers by the question alone
    gets one question in five right.

    Args:
        rng: Source of randomness.
        split: Split of the scenes.
        count: Number of scenes, a multiple of five.
        things: Things of a scene, at most five.
        places: Places of a scene.
    """
    scenes: list[Scene] = []
    while len(scenes) < count:
        colours, shapes = rng.sample(list(COLOURS), things), rng.sample(SHAPES, len(SHAPES))
        turns = [list(zip(colours, shapes[turn:] + shapes[:turn], strict=False)) for turn in range(len(shapes))]
        placed = [_placed(rng, split, looks, places) for looks in turns]
        scenes += [scene for scene in placed if scene is not None] if None not in placed else []
    rng.shuffle(scenes)
    return scenes


def _placed(rng: random.Random, split: Split, looks: list[tuple[str, str]], places: int) -> Scene | None:
    """Draw places for things of these colours and shapes until the scene belongs to the split; None if none does."""
    for _ in range(200):
        free = rng.sample(range(places), len(looks))
        scene = Scene(tuple(sorted(Thing(place, *look) for place, look in zip(free, looks, strict=True))))
        if scene.split == split:
            return scene
    return None


def small_questions(scene: Scene) -> list[tuple[str, str]]:
    """Return a question about the shape of each thing, and its answer."""
    return [(f"Which shape is {thing.colour}?", thing.shape) for thing in scene.things]


def write_small_shapes(
    folder: Path, scenes: dict[str, int] | None = None, ordinary: dict[str, int] | None = None
) -> None:
    """Write a file `{split}.json` in LLaVA's form for each split, and its images `images/{split}/{number}.png`.

    Args:
        folder: A new or empty folder.
        scenes: Number of large images of each split, multiples of five; None sets those of the demo.
        ordinary: Number of images of the tower's size, as in `ORDINARY_SCENES`, likewise.
    """
    rng, ordinary = random.Random(_SEED), ordinary or ORDINARY_SCENES
    for split, count in (scenes or SMALL_SCENES).items():
        drawn = [(scene, rng.choice(GRIDS)) for scene in small_scenes(rng, cast(Split, split), count)]
        _write_split(
            folder, split, drawn + (_ordinary(rng, "train", ordinary["train"]) if split == "train" else []), rng
        )
    _write_split(folder, ORDINARY, _ordinary(rng, "test", ordinary[ORDINARY]), rng)


def _ordinary(rng: random.Random, split: Split, count: int) -> list[tuple[Scene, tuple[int, int]]]:
    return [(scene, (2, 2)) for scene in small_scenes(rng, split, count, things=3, places=4)]


def _write_split(folder: Path, split: str, drawn: list[tuple[Scene, tuple[int, int]]], rng: random.Random) -> None:
    """Draw scenes on their grids of places, and write them with their questions."""
    rows: list[dict[str, Any]] = []
    (folder / "images" / split).mkdir(parents=True)
    for number, (scene, grid) in enumerate(drawn):
        name = f"{split}/{number:04d}.png"
        draw_large(scene, rng, grid).save(folder / "images" / name)
        rows += [_row(f"{split}-{number:04d}-{n}", name, *each) for n, each in enumerate(small_questions(scene))]
    (folder / f"{split}.json").write_text(json.dumps(rows))


def _row(name: str, image: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}
