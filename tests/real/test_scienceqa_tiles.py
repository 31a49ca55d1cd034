"""Real images of ScienceQA as a LLaVA-1.6 reads them: ids, tokens and pixels are those of the stock processor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaNextConfig, LlavaNextImageProcessorPil

from lora_llava.data.conversation import Conversation, Turn
from lora_llava.data.images.image_check import inspect_images
from lora_llava.data.images.image_sources import FolderImages, Pixels
from lora_llava.data.images.tiling import TiledImages
from lora_llava.data.selection import build_rows
from lora_llava.data.templates.named_templates import chat_template, get_template
from lora_llava.model.base import build_processor
from lora_llava.model.families.tower_families import saved_image_processor, tiling_of
from lora_llava.model.tokenizer import load_tokenizer
from lora_llava.model.weights.parts import DEMO_FOLDER

FOLDER = Path(os.environ.get("LORA_LLAVA_SCIENCEQA", ""))
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (FOLDER / "problems.json").is_file(),
        reason="LORA_LLAVA_SCIENCEQA does not name a folder with ScienceQA's problems.json and images",
    ),
]
SETTINGS = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "LlavaNextImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "LlavaNextProcessor",
    "resample": 3,
    "size": {"shortest_edge": 336},
}
"""preprocessor_config.json of llava-hf/llava-v1.6-vicuna-7b-hf."""


def problems() -> dict[str, str]:
    """Questions by the name of their image, of the problems whose image is there."""
    found = json.loads((FOLDER / "problems.json").read_text(encoding="utf-8"))
    names = {f"{each['split']}/{number}/image.png": each["question"] for number, each in found.items()}
    return {name: question for name, question in names.items() if (FOLDER / "images" / name).is_file()}


def test_ids_and_pixels_of_every_image_are_those_of_the_stock_processor(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
    config: Any = LlavaNextConfig(vision_config=vision)
    tokenizer = load_tokenizer(DEMO_FOLDER / "llm")
    tiling = tiling_of(config)
    assert tiling is not None
    images, asked = FolderImages(FOLDER / "images", max_pixels=10**8), problems()
    rows = [
        Conversation(name, (Turn("user", f"<image>\n{question}"), Turn("assistant", "A")), (name,), {})
        for name, question in asked.items()
    ]
    sizes = {name: facts.size for name, facts in inspect_images(images, asked).items()}
    template = get_template("vicuna_v1")
    samples, _ = build_rows(
        rows, tokenizer=tokenizer, template=template, num_image_tokens=TiledImages(tiling, sizes), max_length=8192
    )
    ours = Pixels(images, saved_image_processor(tmp_path, config))
    stock = build_processor(
        tokenizer, config, LlavaNextImageProcessorPil.from_pretrained(tmp_path), chat_template(template)
    )
    tokens = set()
    for sample, (name, question) in zip(samples, asked.items(), strict=True):
        batch = stock(text=text_of(stock, question), images=images.open(name), return_tensors="pt")
        assert sample["input_ids"] == batch["input_ids"][0].tolist(), name
        assert torch.equal(ours([name]), batch["pixel_values"][0]), name
        assert ours.sizes is not None
        assert torch.equal(ours.sizes([name]), batch["image_sizes"]), name
        tokens.add(int((batch["input_ids"] == stock.image_token_id).sum()))
    print(f"{len(asked)} images, {min(tokens):,} to {max(tokens):,} tokens")


def text_of(processor: Any, question: str) -> str:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
    ]
    text: str = processor.apply_chat_template(messages, tokenize=False)
    return text
