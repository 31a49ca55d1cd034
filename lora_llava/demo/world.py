"""The demo's world: scenes of coloured shapes, their images and their captions.

A hash of its contents assigns each scene to one split, so that no scene of the test split occurs in training, whatever
the question.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

Split = Literal["train", "val", "test"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "blue": (36, 84, 214),
    "green": (30, 150, 60),
    "yellow": (245, 200, 20),
    "purple": (140, 50, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = ((255, 255, 255), (244, 240, 228), (228, 238, 246), (232, 244, 230))
PLACE_SIZE = 32
"""Side of a place in pixels."""
IMAGE_SIZE = 2 * PLACE_SIZE
"""Side of an image in pixels; each place is a quadrant."""

_SPLIT_BUCKETS = {"test": range(15), "val": range(15, 20), "train": range(20, 100)}


@dataclass(frozen=True, order=True)
class Thing:
    """One coloured shape at one place (0 top left, 1 top right, 2 bottom left, 3 bottom right)."""

    place: int
    colour: str
    shape: str

    @property
    def where(self) -> str:
        return PLACES[self.place]


@dataclass(frozen=True)
class Scene:
    """Things in reading order; no two share a place, a colour or a shape."""

    things: tuple[Thing, ...]

    @property
    def key(self) -> str:
        return ";".join(f"{t.place}-{t.colour}-{t.shape}" for t in self.things)

    @property
    def split(self) -> Split:
        bucket = int(hashlib.sha256(self.key.encode()).hexdigest()[:8], 16) % 100
        return next(name for name, buckets in _SPLIT_BUCKETS.items() if bucket in buckets)  # type: ignore[misc]


def random_scene(rng: random.Random, split: Split | None = None) -> Scene:
    """Draw a scene of one to three things.

    Args:
        rng: Source of randomness.
        split: Split of the scene; None allows any.

    Returns:
        A scene of `split`.
    """
    while True:
        count = rng.choices((1, 2, 3), weights=(15, 45, 40))[0]
        places = sorted(rng.sample(range(4), count))
        colours = rng.sample(list(COLOURS), count)
        shapes = rng.sample(SHAPES, count)
        scene = Scene(tuple(Thing(p, c, s) for p, c, s in zip(places, colours, shapes, strict=True)))
        if split is None or scene.split == split:
            return scene


def caption(scene: Scene) -> str:
    """Describe the complete scene in one sentence, in reading order."""
    parts = [f"a {t.colour} {t.shape} at the {t.where}" for t in scene.things]
    return (", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]) + "."


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene with random offsets, sizes, shade and background, so that no two images are equal.

    Returns:
        An RGB image of `IMAGE_SIZE` x `IMAGE_SIZE` pixels.
    """
    return draw_with_boxes(scene, rng)[0]


def draw_large(scene: Scene, rng: random.Random, grid: tuple[int, int]) -> Image.Image:
    """Draw a scene of any number of places, whose shapes are as large as in `draw`, and all of the same area.

    Args:
        scene: A scene whose places are numbered in reading order.
        rng: Source of randomness.
        grid: Rows and columns of places.

    Returns:
        An RGB image of `PLACE_SIZE` pixels for each row and column.
    """
    return _draw(scene, rng, grid, lambda thing: math.sqrt(rng.uniform(*_COMMON_AREA) / _AREA[thing.shape]))[0]


Corners = tuple[float, float, float, float]
"""x1, y1, x2, y2 as fractions of the image's sides."""


def draw_with_boxes(scene: Scene, rng: random.Random) -> tuple[Image.Image, list[Corners]]:
    """Draw a scene and return the boxes of its things.

    Returns:
        The image as in `draw`, and the box of each thing.
    """
    return _draw(scene, rng, (2, 2), lambda thing: rng.uniform(*_RADIUS))


def _draw(
    scene: Scene, rng: random.Random, grid: tuple[int, int], radius_of: Callable[[Thing], float]
) -> tuple[Image.Image, list[Corners]]:
    """Draw a scene; `radius_of` returns a thing's radius in half places."""
    scale = 4  # supersampling, for smooth edges
    height, width = (count * PLACE_SIZE for count in grid)
    half = PLACE_SIZE * scale / 2
    image = Image.new("RGB", (width * scale, height * scale), rng.choice(BACKGROUNDS))
    pen = ImageDraw.Draw(image)
    boxes: list[Corners] = []
    for thing in scene.things:
        radius = half * radius_of(thing)
        slack = half - radius
        row, column = divmod(thing.place, grid[1])
        x = half + column * 2 * half + rng.uniform(-slack, slack)
        y = half + row * 2 * half + rng.uniform(-slack, slack)
        shade = rng.randint(-12, 12)
        red, green, blue = (min(255, max(0, value + shade)) for value in COLOURS[thing.colour])
        _draw_shape(pen, thing.shape, x, y, radius, (red, green, blue))
        left, top, right, bottom = (reach * radius for reach in _REACH[thing.shape])
        across, down = width * scale, height * scale
        boxes.append(((x - left) / across, (y - top) / down, (x + right) / across, (y + bottom) / down))
    return image.resize((width, height), Image.Resampling.BOX), boxes


_RADIUS = (0.62, 0.85)
"""Least and largest radius of a shape, in half places."""
_AREA = {"circle": math.pi, "square": 2.89, "triangle": 1.8, "star": math.sqrt(3), "cross": 2.204}
"""Area of a shape of radius 1."""
_COMMON_AREA = (1.21, 1.25)
"""Areas, in squared half places, that every shape has at some radius of `_RADIUS`."""
_REACH = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (0.85, 0.85, 0.85, 0.85),
    "triangle": (1.0, 1.0, 1.0, 0.8),
    "star": (0.866, 1.0, 0.866, 1.0),
    "cross": (1.0, 1.0, 1.0, 1.0),
}
"""Extent of a shape from its centre to the left, top, right and bottom, in radii."""


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, int, int]
) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        half = radius * 0.85
        pen.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius * 0.8), (x + radius, y + radius * 0.8)], fill=fill)
    elif shape == "star":
        pen.regular_polygon((x, y, radius), 3, rotation=0, fill=fill)
        pen.regular_polygon((x, y, radius), 3, rotation=180, fill=fill)
    else:
        arm = radius * 0.33
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
