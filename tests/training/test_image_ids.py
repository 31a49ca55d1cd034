"""Images of several sources are identified by source and name, whatever characters a name has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_llava.data.conversation import Conversation, Turn
from lora_llava.data.images.image_id import ImageId, own_name, own_names, saved_name
from lora_llava.evaluation.row_evaluation import questions_hash
from lora_llava.prepare.sample_preview import preview
from lora_llava.recipe.io import check_recipe
from lora_llava.runs.identity import differences, image_names
from lora_llava.splits.split_rows import Split, sample_rows
from lora_llava.training import finetune as verb
from tests.own_rows import asked, quiet, written
from tests.training.conftest import Plan

COLOURS = {
    ("one", "a.png"): (250, 0, 0),
    ("two", "0|a.png"): (0, 250, 0),
    ("two", "a.png"): (0, 0, 250),
    ("two", "1|0|a.png"): (250, 250, 0),
}
"""The colour of each image, by its source and its name."""


def two_sources(folder: Path) -> list[dict[str, str]]:
    """Write two sources whose images are called alike; each row's answer is its image's name."""
    rows: dict[str, list[dict[str, Any]]] = {"one": [], "two": []}
    for number, ((source, name), colour) in enumerate(COLOURS.items()):
        (folder / source).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), colour).save(folder / source / name)
        rows[source].append(asked(number, name, answer=name))
    return [
        {"path": written(folder / f"{source}.json", mine), "image_folder": str(folder / source)}
        for source, mine in rows.items()
    ]


def colours(split: Split) -> dict[tuple[str, str], Any]:
    """The colour of each row's opened image, by its source and its name."""
    return {
        (row.extra["source"], own_name(image)): split.images.open(image).getpixel((0, 0))
        for row in split.read(range(len(split.rows)))
        for image in row.images
    }


def test_an_image_with_a_bar_in_its_name_is_opened_in_its_own_source(plan: Plan, tmp_path: Path) -> None:
    train = plan(sources=two_sources(tmp_path)).splits["train"]
    assert colours(train) == COLOURS
    assert {image for i in range(len(train.rows)) for image in train.rows.image_files(i)} == set(train.digests)
    assert set(train.digests) == {ImageId(int(source == "two"), name) for source, name in COLOURS}
    assert len(set(train.digests.values())) == len(COLOURS)
    assert train.name_of(1) == "two: row r1 (two.json, index 0) (0|a.png)"


def test_a_single_source_names_its_images_by_themselves(plan: Plan, tmp_path: Path) -> None:
    train = plan(**two_sources(tmp_path)[1]).splits["train"]
    assert set(train.digests) == {"0|a.png", "a.png", "1|0|a.png"}
    assert colours(train) == {place: colour for place, colour in COLOURS.items() if place[0] == "two"}


def test_drawn_rows_and_previews_show_each_image_under_its_name(
    plan: Plan, stage2_content: dict[str, Any], tmp_path: Path
) -> None:
    recipe = plan(sources=two_sources(tmp_path)).recipe
    rows, images, total = sample_rows(recipe, "train", 9)
    assert total == len(COLOURS)
    assert [images.open(row.images[0]).getpixel((0, 0)) for row in rows] == list(COLOURS.values())
    shown = preview(recipe, name="test", output=tmp_path / "page.html", console=quiet()).samples
    assert {(sample.source, *sample.names) for sample in shown} == set(COLOURS)


def test_a_run_with_such_images_trains_and_evaluates(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    stage2_content["data"] = {"format": "conversations", "sources": two_sources(tmp_path), "test_rows": 2}
    stage2_content["data"] |= {"max_length": 300, "system_prompt": ""}
    stage2_content["training"] |= {"max_steps": 1, "eval_every": None, "vision_cache": "memory", "workers": 1}
    metrics = verb.finetune(check_recipe(stage2_content, "test"), Path(), console=quiet())
    answered = [json.loads(line) for line in (tmp_path / "run" / "predictions_after.jsonl").read_text().splitlines()]
    assert len(answered) == metrics["data"]["test"]["used"] == 2
    page = (tmp_path / "run" / "report.html").read_text()
    name_of = {f"r{number}": name for number, (_, name) in enumerate(COLOURS)}
    assert all(name_of[line["question_id"]] in page for line in answered)


@pytest.mark.parametrize("count", [1, 2])
def test_the_changed_image_is_named_with_its_bar(plan: Plan, tmp_path: Path, count: int) -> None:
    found = plan(sources=two_sources(tmp_path)[-count:])
    names = [own_name(image) for image in image_names(found.splits["train"])]
    same = {"tokens": "same", "source": "same", "row_marks": ""}
    before, now = (
        {"versions": {}, "data": {"train": same | {"images": state, "image_marks": "".join(marks)}}}
        for state, marks in (
            ("before", ["00000000"] * len(names)),
            ("now", ["f" * 8 if name == "0|a.png" else "00000000" for name in names]),
        )
    )
    (line,) = differences(before, now, found.splits)
    assert f"1 of {len(names)}, the first is 0|a.png; restore them" in line


def test_saved_hashes_have_the_source_before_the_name() -> None:
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "This."))
    typed = Conversation("r", turns, (ImageId(1, "a.png"), ImageId(0, "0|a.png")))
    text = Conversation("r", turns, ("1|a.png", "0|0|a.png"))
    assert questions_hash([typed]) == questions_hash([text])
    assert [saved_name(image) for image in ("0|a.png", ImageId(3, "a.png"))] == ["0|a.png", "3|a.png"]


def test_an_image_of_several_sources_is_not_a_name_in_one() -> None:
    assert own_names(["a.png", "0|a.png"]) == ("a.png", "0|a.png")
    with pytest.raises(TypeError, match=r"'a.png'\) is an image of several sources; give its name in one source$"):
        own_names(["a.png", ImageId(0, "a.png")])
