"""A LLaVA-1.6 made of a language model, a tower and a projector: Stage 1 trains its newline, Stage 2 carries it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaNextForConditionalGeneration
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from lora_llava import merge
from lora_llava.core.errors import UserError
from lora_llava.inference.open_model import open_speaker
from lora_llava.model.adapter_file import check_fits
from lora_llava.model.adapters import NEWLINE, trained_projector
from lora_llava.model.base import BaseParts
from lora_llava.model.families.llava_kinds import read_llava_config
from lora_llava.model.fast_path.trained_loss import labelled_loss
from lora_llava.model.start import plan_model, prepare_base
from lora_llava.model.vision import dtype_of, llava_of
from lora_llava.planning.run_plan import plan_run
from lora_llava.publishing.verify.model_here import ModelHere
from lora_llava.recipe import Recipe
from lora_llava.recipe.io import check_recipe
from lora_llava.runs.stage1_runs import stage1_of
from lora_llava.training.features import cache_features
from lora_llava.training.parameter_groups import Rates, parameter_groups
from lora_llava.training.stages import build_feeds, build_trained_model
from tests.own_rows import quiet
from tests.training.assembled_tiles import GRID, KEY, SIZES, stage1_of_demo, stage2_of_demo, write_images_and_rows
from tests.training.small_runs import left_at_4, one_and_two, run, same, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images_and_rows(tmp_path_factory.mktemp("assembled"))


def recipe_of(content: dict[str, Any]) -> Recipe:
    return check_recipe(content, "test")


@pytest.fixture(scope="module")
def stages(folder: Path) -> tuple[Path, Path]:
    """Runs of Stage 1 and of Stage 2 after it."""
    one, two = folder / "stage1", folder / "stage2"
    run(recipe_of(stage1_of_demo(folder, one)))
    run(recipe_of(stage2_of_demo(folder, two, stage1_run=str(one))))
    return one, two


def base_of(run_folder: Path) -> Path:
    return Path(json.loads((run_folder / "run.json").read_text())["base"]["name"])


def test_the_base_is_a_stock_llava_1_6(folder: Path) -> None:
    recipe = recipe_of(stage1_of_demo(folder, folder / "unused"))
    base = prepare_base(recipe.model, 7)
    assert base.parts is not None
    assert base.parts.as_dict()["grid"] == GRID
    model, info = LlavaNextForConditionalGeneration.from_pretrained(base.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.image_grid_pinpoints == GRID
    newline = model.model.image_newline.detach().float()
    assert newline.shape == (128,)
    assert float(newline.std()) == pytest.approx(128**-0.5, rel=0.15)
    assert float(newline.mean()) == pytest.approx(0, abs=0.02)
    processor = AutoProcessor.from_pretrained(base.folder)
    assert type(processor) is LlavaNextProcessor
    assert processor.image_processor.image_grid_pinpoints == GRID
    assert processor.image_processor.size == {"shortest_edge": 64}
    other = LlavaNextForConditionalGeneration.from_pretrained(prepare_base(recipe.model, 8).folder)
    assert not torch.equal(other.model.image_newline, model.model.image_newline)


def test_the_canvases_that_are_left_out_are_llava_1_6s(folder: Path) -> None:
    content = stage1_of_demo(folder, folder / "unused")
    content["model"]["high_resolution"] = {}
    config = plan_model(recipe_of(content).model).config
    assert config.image_grid_pinpoints == [[64, 128], [128, 64], [128, 128], [192, 64], [64, 192]]
    content["model"]["max_tiles"] = 2
    assert plan_model(recipe_of(content).model).config.image_grid_pinpoints == GRID[:2]


def test_a_base_without_tiles_keeps_its_key() -> None:
    parts = BaseParts("llm", "a", "tower", "b", "mlp2x_gelu", None, 0)
    assert parts.key == BaseParts(**parts.as_dict()).key == "39405bacda953448c28e"
    tiled = BaseParts("llm", "a", "tower", "b", "mlp2x_gelu", None, 0, grid=((64, 128),))
    assert tiled.key == BaseParts(**json.loads(json.dumps(tiled.as_dict()))).key != parts.key


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_gradients_of_stage_1_are_those_of_the_stock_model(folder: Path, cache: str) -> None:
    recipe = recipe_of(stage1_of_demo(folder, folder / "unused", vision_cache=cache))
    plan, base = plan_run(recipe), prepare_base(recipe.model, recipe.seed)
    cache_features(plan, base, quiet())
    feed, _ = build_feeds(plan)
    model = build_trained_model(recipe, base).train()
    samples = [feed.samples[i] for i in next(row for row in feed.rows if len(row) > 2)]
    loss, _ = labelled_loss(model, feed.collator(samples))
    loss.backward()

    stock = LlavaNextForConditionalGeneration.from_pretrained(base.folder, dtype=torch.float32).requires_grad_(False)
    for parameter in (stock.model.image_newline, *stock.model.multi_modal_projector.parameters()):
        parameter.requires_grad_(True)
    processor, total = AutoProcessor.from_pretrained(base.folder), torch.zeros(())
    for sample in samples:
        image = Image.open(folder / "images" / Path(str(sample["image_files"][0])).name)
        text = processor.tokenizer.decode([i for i in sample["input_ids"] if i != processor.image_token_id])
        batch = processor(
            text=f"<image>{text.removeprefix('<s>')}", images=image, return_tensors="pt", add_special_tokens=True
        )
        assert batch["input_ids"][0].tolist() == sample["input_ids"]
        logits = stock(**batch).logits[0, :-1]
        labels = torch.tensor(sample["labels"])[1:]
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    total.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    found, expected = model.get_base_model().model.image_newline.grad, stock.model.image_newline.grad
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    for name, parameter in trained_projector(model).named_parameters():
        wanted = stock.model.multi_modal_projector.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_the_newline_trains_with_the_projector_in_float32_and_is_reached_without_images(folder: Path) -> None:
    content = stage1_of_demo(folder, folder / "unused")
    content["model"]["dtype"] = "bfloat16"
    recipe = recipe_of(content)
    base = prepare_base(recipe.model, recipe.seed)
    model = build_trained_model(recipe, base).train()
    newline = model.get_base_model().model.image_newline
    assert newline.dtype == torch.float32
    assert dtype_of(model) == torch.bfloat16
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".modules_to_save." not in name]
    assert trained == [KEY]
    groups = parameter_groups(model.named_parameters(), Rates(1.0, 2.0), 0.5)
    place = next(group for group in groups if any(p is newline for p in group["params"]))
    assert (place["lr"], place["weight_decay"], len(place["params"])) == (2.0, 0.0, 3)
    plan = plan_run(recipe)
    assert plan.trained_parameters == {"lora": 0, "projector": 33024, NEWLINE: 128}
    assert plan.step.parts()["gradients"] == 4 * (33024 + 128)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = labelled_loss(model, {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
    loss.backward()
    assert torch.equal(newline.grad, torch.zeros(128))
    content = stage2_of_demo(folder, folder / "unused", untrained=True)
    model = build_trained_model(recipe_of(content), base)
    assert not model.get_base_model().model.image_newline.requires_grad


def test_stage_1_trains_the_newline_and_stage_2_keeps_its_bits(stages: tuple[Path, Path]) -> None:
    one, two = (weights(each) for each in stages)
    initial = load_file(base_of(stages[0]) / "model.safetensors")["image_newline"].float()
    assert one[KEY].dtype == two[KEY].dtype == torch.float32
    assert not torch.equal(one[KEY], initial)
    assert torch.equal(two[KEY], one[KEY])
    assert not torch.equal(two[KEY], two[KEY].bfloat16().float())  # else a rounded one would be equal
    for each in stages:
        assert json.loads((each / "adapter_config.json").read_text())["modules_to_save"] == [
            "multi_modal_projector",
            NEWLINE,
        ]
        assert base_of(each) == base_of(stages[0])


def test_stock_classes_give_our_logits(stages: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(stages[1])
    batch = processor(
        images=[[Image.open(folder / "images" / name)] for name in SIZES],
        text=["USER: <image>\nIs it 1? ASSISTANT:"] * len(SIZES),
        padding=True,
        return_tensors="pt",
    )
    ours = open_speaker(str(stages[1])).model
    base = LlavaNextForConditionalGeneration.from_pretrained(base_of(stages[1]), dtype=torch.float32)
    with torch.no_grad():
        before = base(**batch).logits
        stock = PeftModel.from_pretrained(base, str(stages[1]))
        assert torch.equal(llava_of(stock).model.image_newline, weights(stages[0])[KEY])
        logits = stock(**batch).logits
        assert torch.equal(logits, ours(**batch).logits)
        assert not torch.allclose(logits, before, atol=1e-2)
        auto = AutoModelForImageTextToText.from_pretrained(base_of(stages[1]), dtype=torch.float32)
        assert torch.equal(PeftModel.from_pretrained(auto, str(stages[1]))(**batch).logits, logits)
        if Version(transformers.__version__) < Version("5.19"):  # its own loading leaves modules_to_save out
            return
        direct = AutoModelForImageTextToText.from_pretrained(stages[1], dtype=torch.float32)
        assert torch.equal(direct(**batch).logits, logits)
        report = merge(stages[1], tmp_path / "merged", dtype="float32", quiet=True)
        assert report["adapter_on_bf16_base"]["max_logit_difference"] <= 1e-4
        merged = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(merged(**batch).logits, logits, rtol=0, atol=1e-4)
    assert torch.equal(merged.model.image_newline, weights(stages[0])[KEY])


def test_a_projector_merged_apart_has_the_newline(stages: tuple[Path, Path], tmp_path: Path) -> None:
    merge(stages[1], tmp_path / "apart", dtype="float32", projector_only=True, quiet=True)
    saved = load_file(tmp_path / "apart" / "base" / "model.safetensors")
    assert torch.equal(saved["image_newline"], weights(stages[0])[KEY])
    assert KEY not in weights(tmp_path / "apart" / "adapter")


def test_a_run_is_continued_with_its_newline_and_canvases(stages: tuple[Path, Path], folder: Path) -> None:
    content = stage2_of_demo(folder, folder / "continued", run=str(stages[1]))
    run(recipe_of(content))
    assert torch.equal(weights(folder / "continued")[KEY], weights(stages[0])[KEY])
    assert not same(weights(folder / "continued"), weights(stages[1]))
    content["model"]["high_resolution"] = {"grid": GRID[:2]}
    with pytest.raises(UserError, match=r"model.high_resolution is \{\"grid\": \[\[64, 128\], \[128, 64\]\]\}, but .*"):
        plan_run(recipe_of(content))


@pytest.mark.parametrize("change", ["removed", "added"])
def test_a_file_without_its_newline_or_with_another_one_is_refused(
    stages: tuple[Path, Path], tmp_path: Path, change: str
) -> None:
    base = read_llava_config(base_of(stages[1]))
    tensors = weights(stages[1])
    settings = json.loads((stages[1] / "adapter_config.json").read_text())
    if change == "removed":
        tensors.pop(KEY)
    else:
        settings["modules_to_save"].remove(NEWLINE)
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    fault = "is missing" if change == "removed" else "is not expected"
    with pytest.raises(UserError, match=rf"the base x: model\.image_newline {fault} \(tensors at fault: 1 of"):
        check_fits(tmp_path, base, "x")


def test_a_newline_on_a_base_without_tiles_is_refused(stages: tuple[Path, Path], folder: Path) -> None:
    content = stage2_of_demo(folder, folder / "unused", untrained=True)
    content["model"].pop("high_resolution")
    base = prepare_base(recipe_of(content).model, 0)
    with pytest.raises(UserError, match=r"does not fit the base x: .*image_newline.*; restore it"):
        check_fits(stages[1], read_llava_config(base.folder), "x")


def test_a_stopped_stage_1_resumes_to_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(recipe_of(stage1_of_demo(folder, folder / "whole", vision_cache="memory")))
    stopped = left_at_4(stage1_of_demo(folder, folder / "stopped", vision_cache="memory"), monkeypatch)
    assert KEY in weights(folder / "stopped" / "checkpoints" / "checkpoint-4")
    run(stopped, resume=True)
    assert same(weights(folder / "stopped"), weights(folder / "whole"))


@pytest.mark.more
def test_two_ranks_train_what_one_trains(folder: Path, tmp_path: Path) -> None:
    """Rows without images too: a rank with such a row alone has to give the newline a gradient."""
    content = stage1_of_demo(folder, folder / "unused")
    content["data"] |= {"format": "conversations", "path": str(folder / "rows.json"), "template": "vicuna_v1"}
    content["training"] = {"learning_rate": 1e-3, "batch_size": 1, "epochs": 1, "log_every": 1}
    one, two, _ = one_and_two({key: value for key, value in content.items() if key != "output_dir"}, tmp_path)
    torch.testing.assert_close(weights(one)[KEY], weights(two)[KEY], rtol=1e-4, atol=1e-6)


def test_a_published_projector_may_have_the_newline(folder: Path, tmp_path: Path) -> None:
    content = stage1_of_demo(folder, tmp_path / "unused")
    fresh = load_file(prepare_base(recipe_of(content).model, 0).folder / "model.safetensors")
    names = {"0": "linear_1", "2": "linear_2"}
    published = {
        f"model.mm_projector.{layer}.{kind}": fresh[f"multi_modal_projector.{name}.{kind}"] + 1
        for layer, name in names.items()
        for kind in ("weight", "bias")
    }
    torch.save(published, tmp_path / "without.bin")
    torch.save(published | {"model.image_newline": torch.ones(128)}, tmp_path / "mm_projector.bin")
    for file, expected in (("without.bin", fresh["image_newline"]), ("mm_projector.bin", torch.ones(128))):
        content["model"]["start_from"] = {"projector": str(tmp_path / file)}
        found = load_file(prepare_base(recipe_of(content).model, 0).folder / "model.safetensors")
        assert torch.equal(found["image_newline"], expected.bfloat16())
        name = "multi_modal_projector.linear_1.bias"
        assert torch.equal(found[name], fresh[name] + 1)
    content["model"].pop("high_resolution")
    with pytest.raises(UserError, match=r"mm_projector.bin has image_newline: it is a LLaVA-1.6's; set model.high_res"):
        prepare_base(recipe_of(content).model, 0)


def test_verify_compares_with_the_base_and_its_own_newline(stages: tuple[Path, Path]) -> None:
    here = ModelHere(str(stages[1]))
    newline = llava_of(here.speaker.model).model.image_newline
    trained = newline.detach().clone()
    base = load_file(base_of(stages[1]) / "model.safetensors")["image_newline"].float()
    with here.without_training():
        assert torch.equal(newline, base)
    assert torch.equal(newline, trained)
    assert not torch.equal(trained, base)


def test_a_projector_of_another_kind_is_refused(stages: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    content = stage2_of_demo(folder, tmp_path / "out", stage1_run=str(stages[0]))
    content["model"].pop("high_resolution")
    with pytest.raises(
        UserError, match=r"was trained with model.high_resolution; set model.high_resolution=\{grid: \[\[64, 128\]"
    ):
        plan_model(recipe_of(content).model)
    content["model"]["high_resolution"] = {"grid": GRID[:1]}
    with pytest.raises(UserError, match=r"was trained with the canvases .* name the same grid"):
        plan_model(recipe_of(content).model)
    (tmp_path / "high.yaml").write_text(json.dumps(stage1_of_demo(folder, tmp_path / "high")))
    content["model"] |= {"high_resolution": None, "start_from": {"stage1_recipe": "high.yaml"}}
    with pytest.raises(
        UserError, match=r"high.yaml has model.high_resolution \{'grid': .*, this recipe None; make them"
    ):
        stage1_of(recipe_of(content), tmp_path)


def test_a_llava_1_6_may_start_from_the_projector_of_a_llava_1_5(folder: Path, tmp_path: Path) -> None:
    layer = {"weight": torch.eye(128), "bias": torch.zeros(128)}
    published = {f"model.mm_projector.{at}.{name}": value for at in (0, 2) for name, value in layer.items()}
    torch.save(published, tmp_path / "mm_projector.bin")
    low = stage1_of_demo(folder, tmp_path / "low", max_steps=1)
    low["model"] |= {"start_from": {"projector": str(tmp_path / "mm_projector.bin")}}
    low["model"].pop("high_resolution")
    (tmp_path / "low.yaml").write_text(json.dumps(low))
    content = stage2_of_demo(folder, tmp_path / "out", stage1_recipe="low.yaml")
    assert stage1_of(recipe_of(content), tmp_path) is not None
    run(recipe_of(low))
    content["model"]["start_from"] = {"stage1_run": str(tmp_path / "low")}
    line = f"image_newline is random and stays so, since {tmp_path}/low has none; Stage 1 with the same model.high"
    assert line in run(recipe_of(content))
    base = load_file(base_of(tmp_path / "out") / "model.safetensors")
    assert torch.equal(weights(tmp_path / "out")[KEY], base["image_newline"].float())
    before, after = (weights(tmp_path / name) for name in ("low", "out"))
    names = [name for name in before if "multi_modal_projector" in name]
    assert len(names) == 4
    assert max(float((before[name] - after[name]).abs().max()) for name in names) < 0.02  # two steps of 5e-3
