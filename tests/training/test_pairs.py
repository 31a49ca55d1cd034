"""Every language model of the table with every tower: plan, train, resume, evaluate, chat, merge, and stock answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, pipeline

from lora_llava import evaluate, merge
from lora_llava.commands.main import main
from lora_llava.inference.open_model import open_speaker
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.speak import stream_answer, user_message
from lora_llava.model.start import plan_model
from lora_llava.planning.run_plan import build_run_processor
from lora_llava.recipe import ModelSection, Recipe, StartFrom, dump_recipe
from lora_llava.recipe.io import check_recipe
from tests.ends import act_at
from tests.model.small_families import TOWER_KINDS, make_tower
from tests.training.small_pairs import KINDS, make_model
from tests.training.small_runs import PulledPlugError, pull_plug, run

RED = Image.new("RGB", (40, 24), (220, 30, 30))
QUESTION = "Which colour is shown?"
QUICK = {("gemma3_text", "siglip")}
"""Pairs that differ most; the others run with `pytest -m more`."""
STOPS = {"phi3": "<|end|>", "gemma3_text": "<end_of_turn>"}
"""The tokens that end an answer where they are not the tokenizer's EOS."""
PAIRS = [
    pytest.param(name, tower, marks=() if (name, tower) in QUICK else pytest.mark.more)
    for name in KINDS
    for tower in TOWER_KINDS
]


def recipe_of(content: dict[str, Any], folder: Path, name: str, tower: str) -> Recipe:
    """Return a recipe of a pair that packs its samples, without a system text or template of its own."""
    content["model"] |= {
        "llm": str(make_model(folder / name, name)),
        "vision_tower": str(make_tower(folder / tower, tower)),
    }
    del content["data"]["system_prompt"], content["training"]["batch_size"]
    content["data"]["max_length"] = 600
    content["training"] |= {"max_tokens_per_row": 900, "save_every": 2}
    content["evaluation"] = {"max_new_tokens": 4, "before": 0}
    return check_recipe(content, "test")


def walk(recipe: Recipe, folder: Path, put: Callable[[Any, str, Any], None], undo: Callable[[], None]) -> Path:
    """Train a recipe without a pause, then once more with an end after the checkpoint; return the second run."""
    straight = recipe.model_copy(update={"output_dir": str(folder / "straight")})
    run(straight)
    act_at(3, pull_plug, put)
    with pytest.raises(PulledPlugError):
        run(recipe)
    undo()
    assert "at step 2" in run(recipe, resume=True)
    return Path(recipe.output_dir)


def streamed(name: str) -> str:
    """Return our greedy answer of a model, in float32."""
    speaker = open_speaker(name, quantization="none", dtype="float32")
    return "".join(stream_answer(speaker, [user_message(QUESTION, [RED])], Sampling(max_new_tokens=12)))


def stock_answer(folder: Path) -> str:
    """Return the greedy answer of transformers' pipeline."""
    pipe = pipeline("image-text-to-text", model=str(folder), dtype=torch.float32)
    content = [{"type": "image", "image": RED}, {"type": "text", "text": QUESTION}]
    found = pipe(text=[{"role": "user", "content": content}], max_new_tokens=12, do_sample=False)
    return str(found[0]["generated_text"][-1]["content"]).strip()


def settings_of(recipe: Recipe) -> tuple[Any, tuple[str, Any]]:
    """Return a recipe's tokenizer, and the chat template and image settings that its run saves."""
    tokenizer, processor, _ = build_run_processor(recipe, plan_model(recipe.model))
    return tokenizer, (processor.chat_template, json.loads(processor.image_processor.to_json_string()))


@pytest.mark.parametrize(("name", "tower"), PAIRS)
def test_a_pair_goes_from_plan_to_stock_answer(
    stage2_content: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    tower: str,
) -> None:
    recipe = recipe_of(stage2_content, tmp_path, name, tower)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert main("plan", [str(file)]) == 0
    assert "warning" not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        folder = walk(recipe, tmp_path, patch.setattr, patch.undo)
    adapters = [(each / "adapter_model.safetensors").read_bytes() for each in (tmp_path / "straight", folder)]
    assert adapters[0] == adapters[1]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["train"]["steps"] == 4
    assert evaluate(folder, quiet=True) == metrics["after"]
    report = merge(folder, tmp_path / "merged", dtype="float32", quiet=True)
    assert report["adapter_on_bf16_base"]["max_logit_difference"] <= report["tolerance"]
    merged = tmp_path / "merged"
    answer = streamed(str(merged))
    assert streamed(str(folder)) == answer == stock_answer(merged)
    assert answer
    tokenizer, again = settings_of(
        recipe.model_copy(update={"model": ModelSection(start_from=StartFrom(llava=str(merged)))})
    )
    assert again == settings_of(recipe)[1]  # a run that goes on from the merged model writes and sees the same
    stops = GenerationConfig.from_pretrained(merged).eos_token_id
    assert tokenizer.convert_tokens_to_ids(STOPS.get(name, KINDS[name].eos)) in (
        [stops] if isinstance(stops, int) else stops
    )
