"""The data of a LLaVA-1.6: tokens by the size of each image, tiles in plans, checks and previews."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import LlavaNextProcessor

from lora_llava.core.errors import UserError
from lora_llava.data.images import image_check
from lora_llava.data.images.image_id import ImageId
from lora_llava.data.images.image_sources import BadImageError
from lora_llava.data.images.tiling import Tiling
from lora_llava.evaluation.answerers import Evaluator
from lora_llava.evaluation.asked.served_prompts import sent_prompts
from lora_llava.model.families.image_counts import tokens_of
from lora_llava.model.start import prepare_base
from lora_llava.model.vision import load_tower, tower_features
from lora_llava.planning.forecast import forecast
from lora_llava.planning.run_plan import RunPlan, plan_run
from lora_llava.planning.timing import time_row
from lora_llava.prepare.row_check import check
from lora_llava.prepare.sample_preview import preview
from lora_llava.recipe.continued import fill_from_run, other_settings
from lora_llava.recipe.io import check_recipe
from lora_llava.training.features import cache_features
from tests.own_rows import asked, quiet, written
from tests.training.tiled_llava import GRID, PATCH, SIZES, TILE, tiled_content, tiled_llava, tiled_rows

TILING = Tiling(GRID, TILE, TILE // PATCH)
TOKENS = {"a.png": 88, "b.png": 60, "c.png": 16, "d.png": 76, "e.png": 88}
TILES = {"a.png": 5, "b.png": 4, "c.png": 3, "d.png": 4, "e.png": 5}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiled_llava(tmp_path_factory.mktemp("tiled"))


@pytest.fixture
def content(llava: str, stage2_content: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return tiled_content(stage2_content, llava, tiled_rows(tmp_path / "rows"))


def planned(content: dict[str, Any], model: dict[str, Any] | None = None, **data: Any) -> RunPlan:
    content = content | {"model": content["model"] | (model or {}), "data": content["data"] | data}
    return plan_run(check_recipe(content, "test"))


def processor_ids(plan: RunPlan, index: int, *, answered: bool) -> list[int]:
    """Return the ids that the stock processor gives for a row and its image."""
    row = plan.splits["train"].read([index])[0]
    turns = row.turns if answered else row.turns[:-1]
    text = [turn.text.removeprefix("<image>\n") for turn in turns]
    messages: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text[0]}]}]
    messages += [{"role": "assistant", "content": [{"type": "text", "text": each}]} for each in text[1:]]
    written_ = plan.processor.apply_chat_template(messages, add_generation_prompt=not answered, tokenize=False)
    images = [plan.splits["train"].images.open(name) for name in row.images]
    assert isinstance(plan.processor, LlavaNextProcessor)
    return list(plan.processor(images=images, text=written_)["input_ids"][0])


def test_ids_of_rows_prompts_and_served_prompts_are_those_of_the_stock_processor(content: dict[str, Any]) -> None:
    plan = planned(content)
    split = plan.splits["train"]
    assert split.sizes == SIZES
    tokens = tokens_of(plan.model.config, split.sizes)
    asked_ = Evaluator(None, plan.tokenizer, plan.template, tokens, split.load_pixels, 1)
    for index, row in enumerate(split.read(range(len(split.rows)))):
        ids = processor_ids(plan, index, answered=True)
        assert list(split.rows[index]["input_ids"]) == ids
        assert len(ids) == split.rows.lengths[index]
        assert asked_.prompt(row) == processor_ids(plan, index, answered=False)
        assert asked_.with_answer(row, row.turns[-1].text)[0] == ids
        [sent] = sent_prompts([row], split.images, plan.tokenizer, plan.template, tokens)
        assert sent.ids == processor_ids(plan, index, answered=False)
    assert [tokens([name]) for name in SIZES] == [[count] for count in TOKENS.values()]


def test_images_are_opened_once_before_rows_are_selected_and_bad_ones_count_as_a_tile(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setenv("LORA_LLAVA_CACHE", str(tmp_path / "own_cache"))
    inspect = image_check.inspect_image
    monkeypatch.setattr(image_check, "inspect_image", lambda images, name: opened.append(name) or inspect(images, name))
    (tmp_path / "rows" / "b.png").write_bytes(b"no image")
    plan = planned(content, on_bad_image="drop", max_length=90, on_overlong="drop")
    split = plan.splits["train"]
    assert sorted(opened) == sorted(SIZES)
    assert split.report.dropped == {"overlong": 3, "bad image": 1}
    assert split.rows.tables[0].image_tokens(1).tolist() == [TILING.tokens((TILE, TILE))]
    planned(content, on_bad_image="drop")
    assert len(opened) == len(SIZES)  # their facts are cached
    with pytest.raises(UserError, match=r"row r1.*: image b\.png cannot be read"):
        planned(content)


def test_an_image_of_another_size_than_counted_is_named(content: dict[str, Any], tmp_path: Path) -> None:
    content["training"]["vision_cache"] = "memory"
    plan = planned(content)
    Image.new("RGB", (40, 8)).save(tmp_path / "rows" / "b.png")
    message = (
        r"^image b\.png has 40 x 8 pixels now, and 23 x 9 when its tokens were counted; restore it, or start again$"
    )
    with pytest.raises(BadImageError, match=message) as error:
        plan.splits["train"].load_pixels(["a.png", "b.png"])
    assert error.value.kind == "changed image"
    with pytest.raises(BadImageError, match=message):
        cache_features(plan, prepare_base(plan.recipe.model, 0), quiet())


def test_a_plan_counts_tiles(content: dict[str, Any]) -> None:
    plan = planned(content)
    rows = plan.splits["train"].rows
    assert rows.tile_counts().tolist() == list(TILES.values())
    assert [rows.tables[0].tile_counts(row) for row in range(5)] == [[count] for count in TILES.values()]
    [heaviest] = {sum(sorted(TILES.values())[1:])}  # 4 rows in a pass, the sliver alone
    assert plan.step.images == heaviest - TILES["e.png"]  # which is computed once with a.png


def test_a_row_with_features_of_two_layers_is_timed(content: dict[str, Any], llava: str, tmp_path: Path) -> None:
    file = shutil.copytree(llava, tmp_path / "two") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vision_feature_layer": [-2, -3]}))
    plan = planned(content, {"start_from": {"llava": str(file.parent)}})
    assert time_row(plan.recipe, plan.step) > 0  # type: ignore[operator]


def test_a_forecast_reads_sizes_from_the_heads_of_files(content: dict[str, Any], tmp_path: Path) -> None:
    content["training"]["share_images"] = "off"
    recipe = check_recipe(content, "test")
    exact, found = plan_run(recipe), forecast(recipe)
    assert found.step.images == exact.step.images
    assert found.step.tokens == exact.step.tokens
    assert "not counted" not in found.source
    content["data"]["max_length"] = 100
    wanted = "; 2 of the 5 read are over data.max_length 100 and not counted: finetune refuses them"
    assert wanted in forecast(check_recipe(content, "test")).source
    (tmp_path / "rows" / "rows.json").unlink()
    unknown = forecast(recipe).step
    assert (unknown.tokens, unknown.images) == (4 * 300, 4 * 300 // (88 + 100) * 5)


def test_max_tiles_limits_canvases_of_config_and_processor(content: dict[str, Any]) -> None:
    plan = planned(content, {"max_tiles": 2})
    assert plan.model.config.image_grid_pinpoints == [[8, 16], [16, 8]]
    assert [list(canvas) for canvas in plan.processor.image_processor.image_grid_pinpoints] == [[8, 16], [16, 8]]
    assert plan.splits["train"].rows.tile_counts().tolist() == [3] * 5
    for index in range(5):
        assert plan.splits["train"].rows[index]["input_ids"] == processor_ids(plan, index, answered=True)


def test_a_plan_knows_its_longest_row_with_fewer_tiles(content: dict[str, Any]) -> None:
    longest = {most: max(planned(content, {"max_tiles": most}).splits["train"].rows.lengths) for most in (4, 3, 2)}
    assert longest[4] > longest[3] > longest[2]
    assert planned(content).step.fewer_tiles == ((3, longest[3]), (2, longest[2]))
    assert planned(content, {"max_tiles": 3}).step.fewer_tiles == ((2, longest[2]),)
    assert planned(content, {"max_tiles": 2}).step.fewer_tiles == ()


def test_max_tiles_that_leave_no_canvas_or_have_no_meaning_are_refused(
    content: dict[str, Any], stage2_content: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"model\.max_tiles is 1, but the model's smallest canvas has 2 tiles; set 2"):
        planned(content, {"max_tiles": 1})
    stage2_content["model"]["max_tiles"] = 2
    with pytest.raises(UserError, match=r"model\.max_tiles is 2, but the model has no tiles"):
        plan_run(check_recipe(stage2_content, "test"))
    stage2_content["model"]["max_tiles"] = 0
    with pytest.raises(UserError, match=r"model\.max_tiles"):
        check_recipe(stage2_content, "test")


@pytest.mark.parametrize(("limit", "most"), [(80, 3), (70, 3), (58, 3), (30, None)])
def test_a_row_whose_image_alone_is_too_long_names_the_tiles_that_fit(
    content: dict[str, Any], limit: int, most: int | None
) -> None:
    recipe = check_recipe(content | {"data": content["data"] | {"max_length": limit}}, "test")
    report = check(recipe, console=Console(file=io.StringIO()))
    wanted = f"its images alone have 88 tokens: the row fits with model.max_tiles={most}"
    if most is None:
        wanted = "its images alone have 88 tokens: the row does not fit with any model.max_tiles"
    assert report.errors[0].message.endswith(wanted)
    figures = report.splits["train"]
    assert figures["over_limit_rows"] == {80: 3, 70: 4, 58: 4, 30: 5}[limit]
    fitting = (figures.get("over_limit_max_tiles"), figures.get("over_limit_rows_that_fit"))
    assert fitting == {80: (2, 3), 70: (2, 3), 58: (3, 2), 30: (None, None)}[limit]
    with pytest.raises(UserError, match=wanted):
        plan_run(recipe)


@pytest.mark.parametrize("rule", ["error", "truncate_answer"])
def test_a_row_whose_image_and_text_are_too_long_names_the_tiles_that_fit(content: dict[str, Any], rule: str) -> None:
    recipe = check_recipe(content | {"data": content["data"] | {"max_length": 90, "on_overlong": rule}}, "test")
    wanted = r"drop( or truncate_answer)?; the row fits with model\.max_tiles=3$"
    report = check(recipe, console=quiet())
    assert re.search(wanted, report.errors[0].message)
    with pytest.raises(UserError, match=wanted):
        plan_run(recipe)


def test_check_shows_the_tokens_of_images(content: dict[str, Any], tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    report = check(check_recipe(content, "test"), console=console)
    bins = report.splits["train"]["image_tokens"]
    assert {each["from"]: each["images"] for each in bins if each["images"]} == {16: 1, 56: 1, 72: 1, 88: 2}
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "  tokens of 5 images, each counted once:" in lines
    assert any(line.startswith("      88 to     95 tokens  ████") and line.endswith(" 2") for line in lines)
    (tmp_path / "rows" / "c.png").write_bytes(b"no image")
    bins = check(check_recipe(content, "test"), console=console).splits["train"]["image_tokens"]
    assert {each["from"]: each["images"] for each in bins if each["images"]} == {56: 1, 72: 1, 88: 2}


def test_a_preview_shows_the_whole_image_beside_its_tiles(content: dict[str, Any], tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    recipe = check_recipe(content, "test")
    page = tmp_path / "page.html"
    shown = preview(recipe, name="tiled", samples=9, output=page, console=console)
    captions = {sample.row_id: (sample.captions[0], sample.images[0].size) for sample in shown.samples}
    each = "tiles, 8 × 8 each"
    assert captions["r0"] == (f"the whole image and 2 × 2 {each}: 88 tokens", (8 * 3 + 5, 8 * 2 + 1))
    assert captions["r1"] == (f"the whole image and 1 × 3 {each}: 60 tokens, none for padding", (8 * 4 + 6, 8))
    assert captions["r3"] == (f"the whole image and 3 × 1 {each}: 76 tokens", (8 * 2 + 4, 8 * 3 + 2))
    assert captions["r0"][0] in page.read_text()
    preview(recipe, name="tiled", output=None, console=console)
    written_ = console.file.getvalue()  # type: ignore[attr-defined]
    assert "<image × 88>" in written_
    assert captions["r0"][0] in written_


def test_a_run_that_continues_another_keeps_its_max_tiles(content: dict[str, Any]) -> None:
    recipes = {
        most: check_recipe(content | {"model": content["model"] | ({"max_tiles": most} if most else {})}, "test")
        for most in (None, 2, 3)
    }
    assert fill_from_run(recipes[None], recipes[2]).model.max_tiles == 2
    assert other_settings(fill_from_run(recipes[3], recipes[2]), recipes[2]) == [("model.max_tiles", 3, 2)]


def test_the_vision_cache_keeps_the_tiles_of_an_image_together_and_counts_them(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content["training"]["vision_cache"] = "memory"
    plan = planned(content)
    base = prepare_base(plan.recipe.model, 0)
    tiles = 5 + 4 + 3 + 4  # e.png is a copy of a.png
    free = SimpleNamespace(available=tiles * 16 * 16 * 4 - 1)  # float32 features of 16 patches, 16 wide
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(UserError, match="features of 4 images need"):
        cache_features(plan, base, quiet())
    free.available += 1
    pixels = plan.splits["train"].load_pixels
    tower = load_tower(base.folder, plan.model.config, torch.float32, torch.device("cpu"))
    wanted = tower_features(tower, plan.model.config, pixels(["c.png", "a.png"]))
    console = quiet()
    cache_features(plan, base, console)
    assert "vision cache: features of 4 images, 0.00 GB, are computed" in console.file.getvalue()  # type: ignore[attr-defined]
    cached = plan.splits["train"].load_pixels
    assert cached(["c.png", "a.png"]).shape == (3 + 5, 16, 16)
    assert torch.allclose(cached(["c.png", "a.png"]), wanted, atol=1e-6)
    assert cached.sizes(["c.png", "a.png"]).tolist() == [[1, 60], [20, 20]]  # type: ignore[attr-defined]


def test_images_of_one_name_in_two_sources_have_their_own_sizes(content: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (23, 9)).save(other / "a.png")
    sources = [{"path": content["data"]["path"]}, {"path": written(other / "rows.json", [asked(9, "a.png")])}]
    content["data"] = {name: value for name, value in content["data"].items() if name != "path"} | {"sources": sources}
    split = planned(content).splits["train"]
    assert split.sizes[ImageId(0, "a.png")] == (20, 20)
    assert split.sizes[ImageId(1, "a.png")] == (9, 23)
    assert split.rows.tables[1].image_tokens(0).tolist() == [TOKENS["b.png"]]
    assert split.rows.tile_counts().tolist() == [*TILES.values(), 4]
    report = check(check_recipe(content, "test"), console=quiet())
    assert sum(each["images"] for each in report.splits["train"]["image_tokens"]) == 6
    assert report.splits["train"]["tokens"] == int(split.rows.lengths.sum())


def test_a_validation_row_and_a_text_row_are_counted(content: dict[str, Any], tmp_path: Path) -> None:
    rows = [asked(n, name) for n, name in enumerate(SIZES)] + [asked(7), asked(8)]
    rows[1] |= {"image": ["b.png", "c.png"]}
    rows[1]["conversations"][0]["value"] = "<image>\n<image>\nWhich?"
    plan = planned(content, path=written(tmp_path / "rows" / "more.json", rows), test_rows=2)
    counts = {}
    for split in plan.splits.values():
        for index, row in enumerate(split.read(range(len(split.rows)))):
            counts[row.row_id] = int(split.rows.tile_counts()[index])
            image = split.rows.tables[0].image_id
            assert list(split.rows[index]["input_ids"]).count(image) == sum(TOKENS[name] for name in row.images)  # type: ignore[index]
    assert counts["r1"] == TILES["b.png"] + TILES["c.png"]
    assert counts.get("r7", 0) == counts.get("r8", 0) == 0
