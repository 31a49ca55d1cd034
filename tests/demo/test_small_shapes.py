"""The demo of high resolution is fair: its shapes need their pixels, and no rule without an image beats one in five."""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from lora_llava import finetune
from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.data.images.tiling import Tiling
from lora_llava.demo import small_shapes
from lora_llava.demo.dataset import build_demo_small
from lora_llava.demo.small_shapes import GRIDS, small_scenes, write_small_shapes
from lora_llava.demo.world import IMAGE_SIZE, SHAPES, Scene, Thing, draw_large
from lora_llava.publishing.card.licences import licence_of
from lora_llava.recipe import load_recipe
from lora_llava.recipe.io import recipes_folder
from lora_llava.splits.encoded_sources import open_sources

SCENES = {"train": 40, "val": 10, "test": 20}
ORDINARY = {"train": 10, "ordinary": 5}
SPLITS = (*SCENES, "ordinary")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_small_shapes(folder, SCENES, ORDINARY)
    return folder


def rows(data: Path, split: str) -> list[dict[str, Any]]:
    return json.loads((data / f"{split}.json").read_text())


def asked(row: dict[str, Any]) -> tuple[str, str]:
    question, answer = row["conversations"]
    return question["value"], answer["value"]


def alone(shape: str, rng: random.Random) -> Image.Image:
    """Draw one red thing in the second row, sixth column, and return its cover of each pixel, 0 to 255."""
    image = draw_large(Scene((Thing(17, "red", shape),)), rng, GRIDS[0])
    background = Image.new("RGB", image.size, image.getpixel((0, 0)))
    blue = ImageChops.difference(image, background).getchannel("B")
    most = blue.getextrema()[1]
    return blue.point([min(255, round(255 * value / most)) for value in range(256)])


def test_every_answer_to_a_question_is_right_equally_often_so_that_a_rule_without_the_image_gets_one_in_five(
    data: Path,
) -> None:
    for split in SPLITS:
        assert len(rows(data, split)) == 5 * SCENES.get(split, 0) + 3 * ORDINARY.get(split, 0)
        right = defaultdict(Counter)
        for row in rows(data, split):
            question, answer = asked(row)
            right[question][answer] += 1
        assert len(right) == (3 if split == "ordinary" else 5)  # five scenes, of the same three colours
        for counts in right.values():
            assert set(counts) == set(SHAPES)
            assert len(set(counts.values())) == 1


def test_no_two_questions_about_an_image_have_one_answer(data: Path) -> None:
    answers = defaultdict(list)
    for split in SPLITS:
        for row in rows(data, split):
            answers[row["image"]].append(asked(row)[1])
    assert Counter(map(len, answers.values())) == {5: sum(SCENES.values()), 3: sum(ORDINARY.values())}
    assert all(len(set(each)) == len(each) for each in answers.values())


def test_scenes_are_of_their_split_and_no_image_is_in_two() -> None:
    rng = random.Random(0)
    for split in ("train", "val", "test"):
        assert {scene.split for scene in small_scenes(rng, split, 25)} == {split}


def test_the_same_seed_writes_the_same_files(data: Path, tmp_path: Path) -> None:
    write_small_shapes(tmp_path, SCENES, ORDINARY)
    files = sorted(path.relative_to(data) for path in data.rglob("*.*"))
    assert len(files) == 4 + sum(SCENES.values()) + sum(ORDINARY.values())
    assert all((tmp_path / path).read_bytes() == (data / path).read_bytes() for path in files)


def test_a_shape_has_the_size_that_the_tower_was_trained_with_and_a_few_pixels_when_the_image_is_scaled_to_it(
    data: Path,
) -> None:
    rng, largest = random.Random(1), 0
    for shape in SHAPES:
        for _ in range(20):
            left, top, right, bottom = alone(shape, rng).getbbox() or (0, 0, 0, 0)
            assert all(159 <= x <= 193 for x in (left, right))  # its place, which is in one tile, and a pixel
            assert all(31 <= y <= 65 for y in (top, bottom))
            assert min(right - left, bottom - top) >= 17
            largest = max(largest, right - left, bottom - top)
    assert 27 <= largest <= 29  # 27.2, of a radius of 0.85 half places, with its smooth edge
    sizes = set()
    for path in (data / "images").rglob("*.png"):
        with Image.open(path) as image:
            sizes.add(image.size)
    assert sizes == {(384, 64), (64, 384), (64, 64)}
    assert largest * IMAGE_SIZE / 384 < 5


def test_all_shapes_have_the_same_area() -> None:
    rng = random.Random(2)
    areas = {shape: statistics.fmean(sum(alone(shape, rng).tobytes()) / 255 for _ in range(20)) for shape in SHAPES}
    assert max(areas.values()) < 1.04 * min(areas.values())


def test_a_split_is_in_the_cache_and_an_unknown_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_shapes, "SMALL_SCENES", {"train": 5, "val": 5, "test": 5})
    file = build_demo_small(tmp_path, "val")
    assert len(json.loads(file.read_text())) == 25
    with pytest.raises(UserError) as caught:
        build_demo_small(tmp_path, "dev")
    assert str(caught.value) == "demo_small has no split 'dev'; it has train, val, test, ordinary"


def test_an_unknown_split_of_a_source_is_named_with_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_LLAVA_CACHE", str(tmp_path))
    source = "data.sources=[{format: conversations, path: demo_small, split: dev}]"
    assert main("check", ["demo_highres.yaml", "data.path=null", source]) == 2
    assert capsys.readouterr().err == (
        "error: data.sources.0.split: demo_small has no split 'dev'; it has train, val, test, ordinary\n"
    )


def test_the_recipe_has_a_canvas_for_each_size_on_which_no_pixel_is_scaled() -> None:
    high = load_recipe(recipes_folder() / "demo_highres.yaml").model.high_resolution
    assert high is not None
    assert high.grid == ((64, 64), (64, 384), (384, 64))
    tiling = Tiling(high.grid, IMAGE_SIZE, 4)
    assert [tiling.canvas(size) for size in high.grid] == list(high.grid)
    assert [tiling.tokens(size) for size in high.grid] == [36, 116, 136]


def test_the_recipe_reads_the_three_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_shapes, "SMALL_SCENES", {"train": 5, "val": 5, "test": 10})
    monkeypatch.setenv("LORA_LLAVA_CACHE", str(tmp_path))
    sources = open_sources(load_recipe(recipes_folder() / "demo_highres.yaml"))
    rows = {name: sum(1 for _ in source.read()) for name, (source,) in sources.items()}
    assert rows == {"train": 25 + 3 * small_shapes.ORDINARY_SCENES["train"], "validation": 25, "test": 50}


def test_the_card_knows_the_licence() -> None:
    assert licence_of("demo_small", "the data").identifier == "apache-2.0"


@pytest.mark.more
def test_with_tiles_the_shapes_are_read_and_without_them_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of the recipe's steps, for both."""
    monkeypatch.chdir(tmp_path)
    right = {}
    for name, changes in (("high", {}), ("low", {"model.high_resolution": None})):
        changes |= {"output_dir": name, "training.max_steps": 300, "evaluation.shuffled": 0}
        run = finetune("demo_highres.yaml", overrides=changes, quiet=True)
        right[name] = run.metrics["after"]["all"]["exact_match"]
    assert 15 < right["low"] < 26  # 20% of 600 questions by chance, 3.2 points are two standard deviations
    assert right["high"] > right["low"] + 40
