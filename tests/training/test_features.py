"""The vision cache: features computed once, bit-equal afterwards, and written completely or not at all."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from lora_llava.core.errors import UserError
from lora_llava.data.images.image_sources import Pixels
from lora_llava.data.images.to_rgb import CONVERSION_RULE
from lora_llava.model import vision_cache
from lora_llava.model.loading import load_base
from lora_llava.model.start import prepare_base
from lora_llava.model.vision import tower_features
from lora_llava.planning.run_plan import plan_run
from lora_llava.recipe.io import check_recipe
from lora_llava.training import features
from lora_llava.training.features import cache_features, cache_key, split_images
from lora_llava.training.finetune import finetune


@pytest.fixture
def content(stage2_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("LORA_LLAVA_CACHE", str(tmp_path / "cache"))
    stage2_content["training"] |= {"vision_cache": "disk"}
    stage2_content["model"]["quantization"] = "none"
    return stage2_content


def cached(content: dict[str, Any]) -> tuple[Any, Any, str]:
    """Return a plan with its cache, its base, and the output."""
    recipe = check_recipe(content, "test")
    plan, base, stream = plan_run(recipe), prepare_base(recipe.model, 0), io.StringIO()
    cache_features(plan, base, Console(file=stream, width=300))
    return plan, base, stream.getvalue()


def all_features(plan: Any) -> dict[str, torch.Tensor]:
    return {name: split.load_pixels(split_images(plan, name)) for name, split in plan.splits.items()}


def shards() -> list[Path]:
    return sorted((features.cache_folder() / "features").rglob("*.safetensors"))


def no_tower(*_: Any) -> Any:
    raise AssertionError("the tower was loaded")


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_features_are_the_tower_s(content: dict[str, Any], where: str) -> None:
    content["training"]["vision_cache"] = where
    plan, base, output = cached(content)
    model = load_base(base.folder, dtype="float32")
    for name, split in plan.splits.items():
        names = split_images(plan, name)
        pixels = Pixels(split.images, plan.processor.image_processor)(names)
        expected = tower_features(model.model.vision_tower, model.config, pixels)
        assert split.load_pixels(names).shape == (len(names), 4, 32)
        torch.testing.assert_close(split.load_pixels(names), expected, rtol=1e-6, atol=1e-6)
    assert "vision cache: 3 images in" in output  # 18 files, three different contents
    assert len(shards()) == (where == "disk")


def test_a_second_run_never_loads_the_tower(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = all_features(cached(content)[0])
    monkeypatch.setattr(features, "load_tower", no_tower)
    found = all_features(cached(content)[0])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_interrupted_run_resumes_its_encoding(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_BATCH", 1)
    batches = []

    def counting(tower: Any, config: Any, pixels: torch.Tensor) -> torch.Tensor:
        batches.append(len(pixels))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return tower_features(tower, config, pixels)

    monkeypatch.setattr(features, "tower_features", counting)
    with pytest.raises(KeyboardInterrupt):
        cached(content)
    assert len(shards()) == 1  # the two that were there
    (shards()[0].parent / "features-00007.safetensors.part").write_bytes(b"half a shard")
    plan, _, output = cached(content)
    assert batches == [1, 1, 1, 1]
    assert "encoded again" not in output
    assert [file.name for file in shards()] == [f"features-0000{i}.safetensors" for i in range(2)]
    assert not list(shards()[0].parent.glob("*.part"))
    assert all(len(tensor) for tensor in all_features(plan).values())


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "missing", "index"])
def test_damage_is_reported_and_repaired(content: dict[str, Any], damage: str) -> None:
    expected = all_features(cached(content)[0])
    file = shards()[0]
    if damage == "bit":
        bits = bytearray(file.read_bytes())
        bits[-5] ^= 1
        file.write_bytes(bits)
    elif damage == "index":
        (file.parent / "index.json").write_text("{")
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-9] if damage == "cut" else b"")
    plan, _, output = cached(content)
    said = {"missing": "is missing: its images are encoded again", "index": "index.json is damaged: all images"}
    assert said.get(damage, "is damaged: its images are encoded again") in output
    assert all(torch.equal(tensor, expected[name]) for name, tensor in all_features(plan).items())
    assert "again" not in cached(content)[2]


def test_a_cache_of_another_tower_is_not_used(content: dict[str, Any]) -> None:
    plan, base, _ = cached(content)
    own = vision_cache.store_folder(features.cache_folder(), cache_key(plan, base))
    index = json.loads((own / "index.json").read_text())
    index["key"]["tower"] = "another"
    (own / "index.json").write_text(json.dumps(index))
    assert "has features of another tower or preprocessing: all images are encoded again" in cached(content)[2]
    content["data"]["image_aspect"] = "crop"  # another preprocessing is another folder
    cached(content)
    assert len({file.parent for file in shards()}) == 2


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_too_little_room_is_refused_with_the_size(content: dict[str, Any], where: str, monkeypatch: Any) -> None:
    content["training"]["vision_cache"] = where
    monkeypatch.setattr(features.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    message = (
        r"training.vision_cache: features of 3 images need 0.0 GB and .* has 0.0 GB free; set training.vision_cache"
    )
    with pytest.raises(UserError, match=message):
        cached(content)


def test_a_run_with_the_cache_equals_one_without(content: dict[str, Any], tmp_path: Path) -> None:
    """Losses to rounding (the tower sees other batch shapes), predictions to the letter; no tower in the model."""
    found = []
    for where in ("off", "disk"):
        content["training"]["vision_cache"] = where
        content["output_dir"] = str(tmp_path / where)
        stream = io.StringIO()
        metrics = finetune(check_recipe(content, "test"), tmp_path, console=Console(file=stream, width=200))
        predictions = (tmp_path / where / "predictions_after.jsonl").read_text()
        losses = [loss for curve in metrics["train"]["loss_curve"].values() for _, loss in curve]
        parts = {row["module"] for row in metrics["model"]["freeze_plan"]}
        found.append((predictions, losses, parts))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    assert found[0][2] - found[1][2] == {"vision tower"}


def test_the_cache_s_contents_reach_workers(content: dict[str, Any], tmp_path: Path) -> None:
    content["training"] |= {"workers": 1, "max_steps": 2}
    metrics = finetune(check_recipe(content, "test"), tmp_path, console=Console(file=io.StringIO()))
    assert metrics["train"]["steps"] == 2


def test_the_key_has_the_background(content: dict[str, Any]) -> None:
    base, keys = prepare_base(check_recipe(content, "test").model, 0), []
    for background in ("white", "black"):
        content["data"]["background"] = background
        keys.append(cache_key(plan_run(check_recipe(content, "test")), base))
    assert [key["background"] for key in keys] == ["white", "black"]
    assert keys[0]["conversion"] == keys[1]["conversion"] == CONVERSION_RULE
