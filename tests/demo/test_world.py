"""The demo is fair: splits share nothing, the corpus holds no image and no asked fact, questions need their image."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from lora_llava.demo import corpus, questions
from lora_llava.demo.dataset import build_demo_captions, build_demo_scienceqa
from lora_llava.demo.world import caption, draw, random_scene

FIELDS = {
    "question",
    "choices",
    "answer",
    "hint",
    "image",
    "task",
    "grade",
    "subject",
    "topic",
    "category",
    "skill",
    "lecture",
    "solution",
    "split",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo_scienceqa(tmp_path_factory.mktemp("demo"), {"train": 400, "val": 60, "test": 200})


def rows(data: Path, split: str) -> list[dict]:
    problems = json.loads((data / "problems.json").read_text())
    return [problems[pid] | {"pid": pid} for pid in json.loads((data / "pid_splits.json").read_text())[split]]


def test_rows_have_every_field_of_scienceqa_and_all_its_kinds(data: Path) -> None:
    test = rows(data, "test")
    assert all(set(row) == FIELDS | {"pid"} for row in test)
    assert {row["subject"] for row in test} == {"natural science", "social science", "language science"}
    kinds = Counter((bool(row["image"]), bool(row["hint"])) for row in test)
    assert set(kinds) == {(True, True), (True, False), (False, True), (False, False)}
    assert any(row["lecture"] for row in test)
    assert all((data / "images" / "test" / row["pid"] / row["image"]).is_file() for row in test if row["image"])


def test_the_same_seed_produces_the_same_files(data: Path, tmp_path: Path) -> None:
    again = build_demo_scienceqa(tmp_path, {"train": 400, "val": 60, "test": 200})
    for file in ("problems.json", "pid_splits.json"):
        assert (again / file).read_bytes() == (data / file).read_bytes()
    images = sorted(path.relative_to(data) for path in data.rglob("*.png"))
    assert len(images) > 100
    assert all((again / path).read_bytes() == (data / path).read_bytes() for path in images)


def test_each_scene_belongs_to_one_split() -> None:
    rng = random.Random(0)
    keys = {split: {random_scene(rng, split).key for _ in range(2000)} for split in ("train", "val", "test")}
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["val"]
    assert not keys["val"] & keys["test"]


def test_no_scene_on_disk_is_in_two_splits(data: Path) -> None:
    scenes = json.loads((data / "scenes.json").read_text())
    shown = {split: {scenes[r["pid"]] for r in rows(data, split) if r["image"]} for split in ("train", "val", "test")}
    assert min(map(len, shown.values())) > 20
    assert not shown["train"] & (shown["val"] | shown["test"])
    assert not shown["val"] & shown["test"]


def test_captions_show_no_scene_of_the_other_splits(tmp_path: Path) -> None:
    rng = random.Random(5)
    others = {caption(random_scene(rng, split)) for split in ("val", "test") for _ in range(4000)}
    captions = {row["conversations"][1]["value"] for row in json.loads(build_demo_captions(tmp_path, 300).read_text())}
    assert not captions & others


def test_text_questions_of_one_split_do_not_occur_in_another(data: Path) -> None:
    drawn = {
        split: {json.dumps([r["question"], r["hint"], r["choices"]]) for r in rows(data, split) if not r["image"]}
        for split in ("train", "test")
    }
    assert not drawn["train"] & drawn["test"]


def test_the_answer_cannot_be_inferred_from_the_question_alone() -> None:
    """Over many scenes, every choice of a visual question is correct about equally often."""
    rng = random.Random(1)
    for draw_row in questions.VISUAL:
        right = Counter(row["answer"] for row in (draw_row(random_scene(rng), rng) for _ in range(3000)))
        most = max(right.values()) / 3000
        assert most < (0.5 if draw_row is questions.count_of else 0.24), draw_row.__name__


def test_the_corpus_contains_none_of_the_facts_that_are_asked() -> None:
    rng = random.Random(2)
    text = " ".join(part for _ in range(3000) for turn in corpus.random_text(rng) for part in turn)
    assert "<image>" not in text
    rows = (draw_row(rng) for draw_row in questions.TEXTUAL for _ in range(200))
    assert "Does" in {row["question"].split()[0] for row in rows}
    for fact in ("is a mammal", "is a bird", "is in Asia", "is a verb", "The sentence is", "A magnet", "is the buyer"):
        assert fact not in text


def test_images_show_what_captions_describe() -> None:
    rng = random.Random(3)
    for _ in range(50):
        scene = random_scene(rng)
        image = draw(scene, rng)
        assert image.size == (64, 64)
        for thing in scene.things:
            row, column = divmod(thing.place, 2)
            quadrant = image.crop((32 * column, 32 * row, 32 * column + 32, 32 * row + 32))
            assert len(quadrant.getcolors(1024) or []) > 1
            assert f"a {thing.colour} {thing.shape} at the {thing.where}" in caption(scene)


def test_captions_have_the_form_of_llava(tmp_path: Path) -> None:
    file = build_demo_captions(tmp_path, 20)
    content = json.loads(file.read_text())
    assert len(content) == 20
    assert all((file.parent / "images" / row["image"]).is_file() for row in content)
    assert {turn["from"] for row in content for turn in row["conversations"]} == {"human", "gpt"}
