"""The LLaVA-Instruct recipes on small files of the same names: types sampled equally, images placed as specified."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from lora_llava.data.images.image_id import own_name
from lora_llava.planning.run_plan import plan_run
from lora_llava.recipe import Recipe, load_recipe
from lora_llava.recipe.schema import ModelSection, StartFrom

FILES = {"conversation_58k": 30, "detail_23k": 10, "complex_reasoning_77k": 50}
IMAGES = 40


@pytest.fixture
def instruct(tmp_path: Path) -> Path:
    """Three files in LLaVA-Instruct's form, whose rows share COCO images of the release before."""
    images = tmp_path / "coco" / "train2017"
    images.mkdir(parents=True)
    for number in range(IMAGES):
        Image.new("RGB", (30, 20), (number, 0, 0)).save(images / f"COCO_train2014_{number:012d}.jpg")
    for name, count in FILES.items():
        rows = []
        for index in range(count):
            turns = 2 if name == "conversation_58k" else 1
            said = [f"{name[:4]} {index} {i}?" if i % 2 == 0 else "It is so." for i in range(2 * turns)]
            said[0] = f"<image>\n{said[0]}" if index % 2 else f"{said[0]}\n<image>"
            number = f"{index % IMAGES:012d}"
            messages = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
            rows.append({"id": number, "image": f"{number}.jpg", "conversations": messages})
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def small(name: str, instruct: Path, parts: Path) -> Recipe:
    overrides = [
        f"data.sources.{place}.{key}={value}"
        for place in range(3)
        for key, value in (("path", instruct), ("image_folder", instruct / "coco" / "train2017"))
    ]
    recipe = load_recipe(name, [*overrides, "data.max_length=500", "data.validation_rows=8", "training.workers=0"])
    model = ModelSection(
        llm=str(parts / "llm"),
        vision_tower=str(parts / "vision_tower"),
        start_from=StartFrom(untrained=True),
        projector_type=recipe.model.projector_type,
    )
    training = recipe.training.model_copy(update={"max_tokens_per_row": 1000, "epochs": 2.0})
    return recipe.model_copy(update={"model": model, "training": training})


@pytest.mark.parametrize("name", ["instruct_qlora.yaml", "instruct_qlora_v0.yaml"])
def test_the_three_types_are_sampled_alike(name: str, instruct: Path, parts: Path) -> None:
    plan = plan_run(small(name, instruct, parts))
    train, validation = plan.splits["train"], plan.splits["validation"]
    used = train.report.sources
    total = len(train.rows)
    assert sum(used.values()) == total == 90 - len(validation.rows)
    assert max(used.values()) - min(used.values()) <= 1
    assert train.epochs is not None
    for epoch in range(2):
        drawn = Counter(train.source_of(i).name for i in train.epochs(epoch))
        assert (
            drawn
            == used
            == {"conversation": drawn["conversation"], "detail": drawn["detail"], "reasoning": drawn["reasoning"]}
        )
    seen = {own_name(image) for i in range(total) for image in train.rows.image_files(i)}
    held = {own_name(image) for i in range(len(validation.rows)) for image in validation.rows.image_files(i)}
    assert seen.isdisjoint(held)


def test_the_first_llava_places_the_image_at_random_by_the_seed(instruct: Path, parts: Path) -> None:
    recipe = small("instruct_qlora_v0.yaml", instruct, parts)
    train = plan_run(recipe).splits["train"]
    rows = train.read(range(len(train.rows)))
    first = [row.turns[0].text.startswith("<image>\n") for row in rows]
    others = [row for row, is_first in zip(rows, first, strict=True) if not is_first]
    assert all(row.turns[0].text.endswith("\n<image>") for row in others)
    assert 0.3 < sum(first) / len(first) < 0.7
    again = plan_run(recipe).splits["train"]
    assert [row.turns for row in again.read(range(len(again.rows)))] == [row.turns for row in rows]
    other = plan_run(recipe.model_copy(update={"seed": 1})).splits["train"]
    places = {row.turns[0].text.replace("<image>", "").strip(): row.turns[0].text for row in rows}
    changed = [
        places.get(row.turns[0].text.replace("<image>", "").strip(), row.turns[0].text) != row.turns[0].text
        for row in other.read(range(len(other.rows)))
    ]
    assert any(changed)


def test_llava_1_5_puts_the_image_first(instruct: Path, parts: Path) -> None:
    train = plan_run(small("instruct_qlora.yaml", instruct, parts)).splits["train"]
    rows = train.read(range(len(train.rows)))
    assert all(row.turns[0].text.startswith("<image>\n") for row in rows)
