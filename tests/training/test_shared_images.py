"""Runs on rows that share images: same losses as without sharing, exact resume, cached features, preview."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_llava.core.errors import UserError
from lora_llava.planning.run_plan import plan_run
from lora_llava.prepare.sample_preview import preview
from lora_llava.recipe.io import check_recipe
from lora_llava.runs.checkpoint import list_checkpoints
from tests.own_rows import asked, drawn, quiet, written
from tests.training.small_runs import launch, left_at_4, recipe_of, rewritten, run, same, weights

IMAGES, QUESTIONS = 6, 4


@pytest.fixture
def content(stage2_content: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Rows about six images with four questions each, one of them about a copy in another format, and text rows."""
    images = drawn(tmp_path / "images", IMAGES)
    rows = []
    for number in range(IMAGES * QUESTIONS):
        name = f"{number % IMAGES}.png"
        if number >= IMAGES * (QUESTIONS - 1):
            Image.open(images / name).save(images / f"copy {number}.bmp")
            name = f"copy {number}.bmp"
        rows.append(asked(number, name, answer=f"Number {number}."))
    rows += [asked(100 + number) for number in range(3)]
    stage2_content["data"] = {
        "format": "conversations",
        "path": written(tmp_path / "rows.json", rows),
        "image_folder": str(images),
        "max_length": 400,
        "system_prompt": "",
        "validation_rows": 4,
    }
    stage2_content["training"] = {"learning_rate": 1e-3, "max_tokens_per_row": 200, "max_steps": 6, "eval_every": 2}
    stage2_content["evaluation"] = None
    return stage2_content


def as_an_early_version_wrote_it(checkpoint: Path) -> None:
    recipe = checkpoint / "recipe.yaml"
    lines = recipe.read_text().splitlines(keepends=True)
    kept = [line for line in lines if "share_images" not in line and "questions_per_image" not in line]
    assert len(kept) == len(lines) - 2
    recipe.write_text("".join(kept))


def read(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "metrics.json").read_text())["train"]


def test_one_step_has_the_loss_and_labels_of_unshared_rows_and_fewer_tokens(content: dict[str, Any]) -> None:
    found = {}
    content["training"] = {"learning_rate": 1e-3, "batch_size": 23, "max_steps": 1, "log_every": 1}
    content["data"]["validation_rows"] = 4
    for share in ("auto", "off"):
        content["output_dir"] += f"-{share}"
        recipe = recipe_of(content, share_images=share)
        output = run(recipe)
        assert ("rows share their image with other rows" in output) == (share == "auto")
        found[share] = read(recipe.output_dir)
    (auto, off) = found["auto"], found["off"]
    for name in ("train", "validation"):
        assert auto["loss_curve"][name] == [pytest.approx(pair, rel=1e-5) for pair in off["loss_curve"][name]]
    assert auto["supervised_tokens"] == off["supervised_tokens"]
    assert auto["tokens"] < off["tokens"]


def test_a_stopped_run_resumes_to_the_same_bytes(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content["training"] |= {"gradient_accumulation": 2, "vision_cache": "memory"}
    whole = recipe_of(content | {"output_dir": content["output_dir"] + "-whole"})
    run(whole)
    assert re.search(r"^shared (\S+), padded \1: equal$", capsys.readouterr().out, re.MULTILINE)
    stopped = left_at_4(content, monkeypatch)
    run(stopped, resume=True)
    assert same(weights(Path(stopped.output_dir)), weights(Path(whole.output_dir)))
    assert read(stopped.output_dir)["loss_curve"] == read(whole.output_dir)["loss_curve"]


def test_a_run_that_began_without_sharing_is_resumed_without(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content["training"]["share_images"] = "off"
    stopped = left_at_4(content, monkeypatch)
    for checkpoint in list_checkpoints(Path(stopped.output_dir) / "checkpoints"):
        rewritten(checkpoint, as_an_early_version_wrote_it)
    content["training"]["share_images"] = "auto"
    run(check_recipe(content, "test"), resume=True)
    whole = content | {"output_dir": content["output_dir"] + "-whole"}
    run(recipe_of(whole, share_images="off"))
    assert same(weights(Path(content["output_dir"])), weights(Path(whole["output_dir"])))


def test_a_run_that_began_with_sharing_is_not_resumed_without(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    left_at_4(content, monkeypatch)
    content["training"]["share_images"] = "off"
    message = "the order of the rows changed since the run began: .*; set training.share_images to what it was"
    with pytest.raises(UserError, match=message):
        run(check_recipe(content, "test"), resume=True)


def test_rows_with_other_text_before_the_image_are_counted(content: dict[str, Any], tmp_path: Path) -> None:
    rows = json.loads((tmp_path / "rows.json").read_text())
    rows[0]["conversations"].insert(0, {"from": "system", "value": "Look closely."})
    written(tmp_path / "rows.json", rows)
    content["data"]["validation_rows"] = 0
    plan = plan_run(recipe_of(content))
    assert plan.sharing[0].startswith("23 of 27 rows share their image with other rows, and it is computed once")
    assert plan.sharing[1].startswith("1 rows have the image of another row, but another text before it")


def test_the_preview_shows_the_groups_of_the_run(content: dict[str, Any]) -> None:
    recipe = recipe_of(content)
    plan = plan_run(recipe)
    shown = preview(recipe, name="test", output=None, console=quiet())
    shared, lengths = plan.order.shared, plan.splits["train"].rows.lengths.tolist()
    assert shared is not None
    for row, expected in zip(shown.rows, plan.order.rows, strict=False):
        assert row.used == shared.tokens(expected, lengths)
        assert sum(map(bool, row.prefixes)) == sum(len(run) > 1 for run in shared.runs(expected))
    samples = [plan.splits["train"].rows[i] for row in plan.order.rows for i in row]
    for found, sample in zip(shown.samples, samples, strict=False):
        assert (found.row_id, found.length) == (sample["row_id"], len(sample["input_ids"]))
        assert len(found.images) == len(sample["image_files"])


@pytest.mark.more
def test_two_ranks_train_what_one_trains(content: dict[str, Any], tmp_path: Path) -> None:
    content["training"] = {"learning_rate": 1e-3, "batch_size": 6, "epochs": 2, "log_every": 1}
    alone = content | {"training": content["training"] | {"gradient_accumulation": 2}}
    run(check_recipe(alone | {"output_dir": str(tmp_path / "one")}, "test"))
    two = launch(content, tmp_path / "two")
    assert two.returncode == 0, two.stderr
    one_curve, two_curve = (read(str(tmp_path / name))["loss_curve"]["train"] for name in ("one", "two"))
    assert two_curve == [pytest.approx(pair, rel=1e-4) for pair in one_curve]
    shutil.rmtree(tmp_path / "two")
