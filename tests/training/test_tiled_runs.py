"""Runs of a LLaVA-1.6 from recipe to merged model, on images of different sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from lora_llava import evaluate, merge
from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.data.conversation import Conversation, Turn
from lora_llava.evaluation.asked.spoken_answers import by_speaker
from lora_llava.inference.open_model import open_speaker
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.speak import encode_messages, stream_answer, user_message
from lora_llava.model.adapter_file import check_fits
from lora_llava.model.families.llava_kinds import read_llava_config
from lora_llava.model.start import prepare_base
from lora_llava.model.vision import llava_of
from lora_llava.model.weights.tensor_files import lazy_tensors
from lora_llava.planning.run_plan import plan_run
from lora_llava.publishing.card.model_card import add_card
from lora_llava.publishing.package import collect
from lora_llava.recipe.io import check_recipe, load_recipe
from lora_llava.training.features import cache_features
from tests.model.small_families import section
from tests.model.small_tiled import GRID, SIZES, NamedImages, images, make_tiled
from tests.own_rows import asked, quiet, written
from tests.training.small_runs import FSDP, left_at_4, one_and_two, run, same, weights


@pytest.fixture(scope="module")
def tiled(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA-1.6 made of the parts."""
    base = prepare_base(section(parts / "llm", parts / "vision_tower"), 0).folder
    return make_tiled(base, tmp_path_factory.mktemp("tiled") / "llava")


@pytest.fixture
def content(stage2_content: dict[str, Any], tiled: Path, tmp_path: Path) -> dict[str, Any]:
    """Three questions about each of five images, one of them about two images, and text rows."""
    (tmp_path / "images").mkdir()
    for name, image in images().items():
        image.save(tmp_path / "images" / name)
    rows = [asked(number, list(SIZES)[number % 5], f"Number {number}.") for number in range(15)]
    rows[3] |= {"image": ["high.png", "wide.png"]}
    rows[3]["conversations"][0]["value"] = "<image>\n<image>\nWhich?"
    rows += [asked(100 + number) for number in range(3)]
    data = {"format": "conversations", "path": written(tmp_path / "rows.json", rows), "max_length": 200}
    data |= {"image_folder": str(tmp_path / "images"), "system_prompt": "", "validation_rows": 3, "test_rows": 3}
    return stage2_content | {
        "model": {"start_from": {"llava": str(tiled)}},
        "data": data,
        "training": {"learning_rate": 5e-3, "max_tokens_per_row": 300, "max_steps": 6, "eval_every": 2, "log_every": 1},
        "evaluation": {"max_new_tokens": 3, "before": 2, "after": 3},
    }


def newline_of(folder: Path) -> torch.Tensor:
    return next(tensor.load() for tensor in lazy_tensors(folder) if tensor.name.endswith("image_newline"))


VISION = {"r": 2, "alpha": 6.0, "learning_rate": 1e-2}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"quantization": "nf4"}, marks=pytest.mark.more),
        pytest.param({"vision": VISION}, marks=pytest.mark.more),
        {"max_tiles": 2},
    ],
)
def test_a_run_is_trained_evaluated_merged_and_opened_with_stock_classes(
    content: dict[str, Any], tiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any]
) -> None:
    part = "lora" if "vision" in more else "model"
    content[part] = content[part] | more
    output = run(check_recipe(content, "test"))
    assert re.search(r"^shared (\S+), padded \1: equal$", capsys.readouterr().out, re.MULTILINE)
    folder = tmp_path / "run"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["train"]["steps"] == 6
    assert "image newline" in output
    names = list(weights(folder))
    assert not [name for name in names if "newline" in name]
    assert sum("vision_tower" in name for name in names) == (24 if "vision" in more else 0)
    evaluate(folder, quiet=True)
    check_card(folder, limited="max_tiles" in more)
    report = merge(folder, tmp_path / "merged", dtype="float32", quiet=True)
    delta = report["adapter_on_bf16_base"]
    assert delta["max_logit_difference"] <= 1e-4
    assert delta["greedy_equal"] == delta["prompts"] == 8
    assert report["adapter_effect"] > 1e-3
    merged, info = LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(merged.model.image_newline, newline_of(tiled))
    grid = [canvas for canvas in GRID if "max_tiles" not in more or canvas[0] * canvas[1] <= 2 * 32 * 32]
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert merged.config.image_grid_pinpoints == processor.image_processor.image_grid_pinpoints == grid
    base = LlavaNextForConditionalGeneration.from_pretrained(tiled, dtype=torch.float32)
    base.config.image_grid_pinpoints = grid
    adapted = PeftModel.from_pretrained(base, str(folder))
    batch = processor(
        images=[[images()[name]] for name in SIZES],
        text=["USER: <image>\nIs it 1? ASSISTANT:"] * len(SIZES),
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, adapted(**batch).logits, rtol=0, atol=1e-4)


def check_card(folder: Path, limited: bool) -> None:
    package = collect(folder, "me/base", "c" * 40)
    add_card(package, "me/tiles")
    card = package.files["README.md"]
    assert isinstance(card, bytes)
    assert b"A LoRA adapter for LLaVA (`LlavaNextForConditionalGeneration`)" in card
    line = b"base.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints"
    assert (line in card) == limited
    assert f"aspect tiles, up to {2 if limited else 4} (auto)".encode() in card
    assert f"tiles, up to {2 if limited else 4}, and as a whole" in (folder / "report.html").read_text()


def test_a_run_continues_with_its_tiles(content: dict[str, Any], tmp_path: Path, tiled: Path) -> None:
    content["evaluation"] = None
    content["model"]["max_tiles"] = 2
    content["training"]["max_steps"] = 2
    run(check_recipe(content, "test"))
    more = content | {"output_dir": str(tmp_path / "more"), "model": {"start_from": {"run": str(tmp_path / "run")}}}
    file = tmp_path / "more.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in more.items() if key != "lora"}))
    run(load_recipe(file))
    speaker = open_speaker(str(tmp_path / "more"))
    assert llava_of(speaker.model).config.image_grid_pinpoints == GRID[:2]
    assert torch.equal(llava_of(speaker.model).model.image_newline, newline_of(tiled))
    file = tmp_path / "more" / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.model.image_newline": newline_of(tiled)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.image_newline is not expected"):
        check_fits(tmp_path / "more", read_llava_config(tiled), "the base")


@pytest.mark.parametrize(
    ("cache", "vision"), [pytest.param("off", None, marks=pytest.mark.more), ("memory", None), ("off", VISION)]
)
def test_a_stopped_run_resumes_to_the_same_bytes(
    content: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache: str,
    vision: dict[str, Any] | None,
) -> None:
    content["evaluation"] = None
    content["training"]["vision_cache"] = cache
    content["lora"] = content["lora"] | {"vision": vision}
    run(check_recipe(content | {"output_dir": str(tmp_path / "whole")}, "test"))
    stopped = left_at_4(content, monkeypatch)
    run(stopped, resume=True)
    assert same(weights(Path(stopped.output_dir)), weights(tmp_path / "whole"))


@pytest.mark.more
def test_cached_features_are_those_of_the_tower(content: dict[str, Any]) -> None:
    content["evaluation"] = None
    losses = []
    for cache in ("off", "disk"):
        content["training"] |= {"vision_cache": cache, "max_steps": 2}
        run(check_recipe(content | {"output_dir": content["output_dir"] + cache}, "test"))
        curve = json.loads(Path(content["output_dir"] + cache, "metrics.json").read_text())["train"]["loss_curve"]
        losses.append(curve["train"])
    assert losses[1] == [pytest.approx(pair, rel=1e-5) for pair in losses[0]]
    plan = plan_run(check_recipe(content, "test"))
    base = prepare_base(plan.recipe.model, 0)
    cache_features(plan, base, quiet())
    names = plan.splits["train"].rows.image_files(0)
    assert len(plan.splits["train"].load_pixels(names)) > len(names)


def test_a_chat_encodes_what_the_stock_processor_encodes(tiled: Path) -> None:
    speaker = open_speaker(str(tiled))
    found = images()
    plain = user_message("What is shown?", [found["wide.png"], found["high.png"]])
    typed = user_message("What is <s> shown?", [found["wide.png"], found["high.png"]])
    ids, said = [], []
    for message in (plain, typed):
        batch = encode_messages(speaker, [message])
        ids.append(int((batch["input_ids"] == speaker.processor.image_token_id).sum()))
        assert batch["image_sizes"].tolist() == [list(SIZES["wide.png"]), list(SIZES["high.png"])]
        said.append("".join(stream_answer(speaker, [message], Sampling(temperature=0.0, max_new_tokens=6))))
    stock = speaker.processor.apply_chat_template(
        [plain], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert ids == [int((stock["input_ids"] == speaker.processor.image_token_id).sum())] * 2
    rows = [
        Conversation(name, (Turn("user", text), Turn("assistant", "?")), ("wide.png", "high.png"), {})
        for name, text in (
            ("plain", "<image>\n<image>\nWhat is shown?"),
            ("typed", "<image>\n<image>\nWhat is <s> shown?"),
        )
    ]
    answers = dict(by_speaker(speaker, NamedImages(), 2, Sampling(temperature=0.0, max_new_tokens=6))(rows, ()))  # type: ignore[arg-type]
    assert [answers[place].text for place in range(2)] == said
    assert all(said)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"data": {"image_aspect": "pad"}}, "data.image_aspect is pad, and a LLaVA-1.6 cuts images into tiles itself"),
    ({"lora": None, "stage": 1}, "stage is 1, which trains the projector of assembled models"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_settings_that_do_not_work_yet_are_refused(
    content: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    changed = {key: content[key] | value if isinstance(value, dict) else value for key, value in change.items()}
    with pytest.raises(UserError, match=re.escape(message)):
        plan_run(check_recipe(content | changed, "test"))


@pytest.mark.more
@pytest.mark.parametrize("kind", ["complete", "sharded", "tower"])
def test_two_ranks_train_what_one_trains(content: dict[str, Any], tmp_path: Path, kind: str) -> None:
    content["evaluation"] = None
    content["training"] = {"learning_rate": 1e-3, "batch_size": 3, "epochs": 1, "log_every": 1}
    content["lora"] = content["lora"] | {"vision": VISION if kind == "tower" else None}
    content["training"]["gradient_checkpointing"] = kind == "sharded" or "auto"
    content.pop("output_dir")
    one, two, said = one_and_two(content, tmp_path, FSDP if kind == "sharded" else None)
    assert ("FSDP2: this process has" in said) == (kind == "sharded")
    curves = [json.loads((each / "metrics.json").read_text())["train"]["loss_curve"]["train"] for each in (one, two)]
    assert curves[1] == [pytest.approx(pair, rel=1e-5) for pair in curves[0]]
    expected, found = weights(one), weights(two)
    assert found.keys() == expected.keys()
    assert max(float((found[name] - value).abs().max()) for name, value in expected.items()) < 1e-5


def test_export_names_what_llama_cpp_does_otherwise(
    tiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("export", [str(tiled), "--format", "gguf", "--output", str(tmp_path / "gguf")]) == 2
    found = " ".join(capsys.readouterr().err.split())
    assert "is a LLaVA-1.6 (llava_next), of which llama.cpp computes other answers: it reads tile after tile" in found
