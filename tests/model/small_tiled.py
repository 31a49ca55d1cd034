"""A tiny LLaVA-1.6 as a folder from the Hub: stock model, stock processor, and images of different sizes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)

from lora_llava.data.templates.named_templates import chat_template, get_template

TILE = 32
GRID = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
SIZES = {"wide.png": (30, 70), "high.png": (90, 31), "square.png": (64, 64), "small.png": (7, 9), "line.png": (2, 90)}
"""Height and width of images: two, three and four tiles, and padding above, below and at the sides."""


def make_tiled(base: Path, folder: Path) -> Path:
    """Save a LLaVA-1.6 with the language model, tower, projector and tokenizer of a LLaVA's folder, in float32."""
    old = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    config = LlavaNextConfig(
        text_config=old.config.text_config,
        vision_config=old.config.vision_config,
        image_token_index=old.config.image_token_index,
        image_grid_pinpoints=GRID,
        image_seq_length=old.config.image_seq_length,
    )
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(old.state_dict(), strict=False)
    assert (missing, unexpected) == (["model.image_newline"], [])
    model.save_pretrained(folder)
    processor_of(base, config.vision_config.patch_size).save_pretrained(folder)
    shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
    return folder


def processor_of(base: Path, patch_size: int = 8) -> LlavaNextProcessor:
    """The stock processor of the tiny LLaVA-1.6."""
    square = {"height": TILE, "width": TILE}
    pixels = LlavaNextImageProcessorPil(size={"shortest_edge": TILE}, crop_size=square, image_grid_pinpoints=GRID)
    return LlavaNextProcessor(
        pixels,
        AutoTokenizer.from_pretrained(base),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(get_template("vicuna_v1")),
    )


def images() -> dict[str, Image.Image]:
    """Images of noise of the sizes of `SIZES`."""
    generator = np.random.default_rng(0)
    return {name: Image.fromarray(generator.integers(0, 255, (*size, 3), np.uint8)) for name, size in SIZES.items()}


class NamedImages:
    """The images by name, as the images of a split."""

    def __init__(self) -> None:
        self.images, self.opened = images(), 0

    def open(self, name: Any) -> Image.Image:
        self.opened += 1
        return self.images[name]
