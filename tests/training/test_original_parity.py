"""Training compared with LLaVA's code: ids, labels, logits, and six optimizer steps of a tiny LLaVA-1.5.

The reference was computed by haotian-liu/LLaVA at c121f04 (CPU, float32). It is not part of the project; without it
these tests are skipped.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

from lora_llava.data import encode_conversation
from lora_llava.data.collator import PackedCollator
from lora_llava.model.start import prepare_base
from lora_llava.model.tokenizer import load_tokenizer
from lora_llava.planning.run_plan import plan_run
from lora_llava.publishing.import_llava import import_llava
from lora_llava.recipe.io import check_recipe
from lora_llava.splits.encoded_sources import no_progress
from lora_llava.training.feed import Feed
from lora_llava.training.stages import build_trained_model, build_trainer

IMAGE_TOKENS = 16  # (56 / 14) ** 2
STEPS, BATCH = 6, 4


@pytest.fixture(scope="module")
def original() -> Path:
    """LLaVA's tiny model and what LLaVA's code computed with it."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "original_llava"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: reference data that is not part of the project")
    return folder


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def expanded(ids: list[int], image_id: int, fill: int) -> list[int]:
    """Return LLaVA's list with its -200 for each image expanded."""
    return [value for token in ids for value in ([fill] * IMAGE_TOKENS if token == image_id else [token])]


def test_rows_have_llava_s_ids_and_labels(original: Path) -> None:
    tokenizer = load_tokenizer(original / "vicuna")
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    golden = {row["id"]: row for row in read(original / "llava15_golden.json")["scienceqa_rows"]}
    rows = read(original / "scienceqa_rows.json")
    assert len(rows) == len(golden) == 40
    for row in rows:
        found = encode_conversation(
            row["conversations"], tokenizer=tokenizer, template="vicuna_v1", num_image_tokens=IMAGE_TOKENS
        )
        wanted = golden[row["id"]]
        assert found["input_ids"] == expanded(wanted["input_ids"], -200, image_id), row["id"]
        labels = [
            label
            for token, label in zip(wanted["input_ids"], wanted["labels"], strict=True)
            for label in [label] * (IMAGE_TOKENS if token == -200 else 1)
        ]
        assert found["labels"] == labels, row["id"]


def test_the_imported_model_gives_llava_s_logits_by_a_stock_processor(original: Path, tmp_path: Path) -> None:
    import_llava(
        original / "llava15",
        tmp_path / "stock",
        vision_tower=str(original / "clip56"),
        console=Console(file=io.StringIO(), width=160),
    )
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "stock", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "stock", backend="pil")
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    images = original.parent / "scienceqa_sample" / "images"
    logits = np.load(original / "llava15_logits.npz")
    for number, talk in enumerate(read(original / "llava15_golden.json")["talks"]):
        messages = []
        for question, answer in talk["turns"]:
            messages.append({"role": "user", "content": question})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        opened = [Image.open(images / name).convert("RGB") for name in talk["images"]]
        batch = processor(text=text, images=opened or None, return_tensors="pt")
        assert batch["input_ids"][0].tolist() == expanded(talk["input_ids"], -200, image_id)
        with torch.no_grad():
            found = model(**batch).logits[0, -1, :32000].numpy()
        np.testing.assert_allclose(found, logits[f"last_logits_{number}"], rtol=0, atol=1e-4)


def recipe_of(original: Path, output: Path) -> Any:
    content = {
        "stage": 2,
        "output_dir": str(output),
        "model": {
            "llm": str(original / "vicuna"),
            "vision_tower": str(original / "clip56"),
            "quantization": "none",
            "dtype": "float32",
            "start_from": {"projector": str(original / "mm_projector.bin")},
        },
        "lora": {"r": 128, "alpha": 256, "dropout": 0},
        "data": {
            "format": "conversations",
            "path": str(original / "rows.json"),
            "image_folder": str(original.parent / "scienceqa_sample" / "images"),
            "max_length": 2048,
        },
        "training": {
            "batch_size": BATCH,
            "max_steps": STEPS,
            "learning_rate": 2e-4,
            "projector_learning_rate": 2e-5,
            "warmup_ratio": 0.03,
            "lr_scheduler": "cosine",
            "log_every": 1,
        },
    }
    return check_recipe(content, "test")


def load_start(model: torch.nn.Module, file: Path) -> None:
    """Set LoRA and projector to the initial weights of LLaVA's run."""
    theirs = torch.load(file, weights_only=True)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, value in trained.items():
            old = name.replace("model.language_model.layers", "model.layers")
            if "multi_modal_projector" in name:
                layer, kind = name.split(".")[-2:]
                old = f"base_model.model.model.mm_projector.{'0' if layer == 'linear_1' else '2'}.{kind}"
            value.copy_(theirs.pop(old))
    assert not theirs


def test_six_steps_have_llava_s_losses(original: Path, tmp_path: Path) -> None:
    wanted = read(original / "losses_vocabulary_padded.json")
    plan = plan_run(recipe_of(original, tmp_path / "run"), no_progress)
    base = prepare_base(plan.recipe.model, plan.recipe.seed)
    model = build_trained_model(plan.recipe, base)
    load_start(model, original / "lora_init.pt")
    split = plan.splits["train"]
    rows = [list(range(step * BATCH, (step + 1) * BATCH)) for step in range(STEPS)]
    feed = Feed(split.rows, rows, PackedCollator(split.load_pixels))
    trainer, _, _ = build_trainer(plan, model, feed, None)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([entry["loss"] for entry in logged], wanted["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose([entry["grad_norm"] for entry in logged], wanted["gn"], rtol=0, atol=1e-4)
