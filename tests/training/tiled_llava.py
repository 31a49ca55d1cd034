"""A tiny LLaVA-1.6 of stock classes, and rows with images of many sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)

from lora_llava.demo.build import build_tokenizer
from tests.own_rows import asked, written
from tests.tiny_tower import tiny_tower

TILE, PATCH = 8, 2
GRID = ((8, 16), (16, 8), (16, 16), (24, 8), (8, 24))
SIZES = {"a.png": (20, 20), "b.png": (9, 23), "c.png": (1, 60), "d.png": (40, 13), "e.png": (20, 20)}
"""Height and width of the images; `c.png` is a sliver, and `e.png` equals `a.png`."""


def tiled_llava(folder: Path) -> str:
    """Write the model with its processor."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(0)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = tiny_tower(TILE, PATCH, hidden=16, inner=24)
    config = LlavaNextConfig(
        text_config=text,
        vision_config=vision,
        image_grid_pinpoints=[list(canvas) for canvas in GRID],
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    LlavaNextForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    LlavaNextProcessor(
        pixels,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    ).save_pretrained(folder)
    return str(folder)


def tiled_rows(folder: Path, names: tuple[str, ...] = tuple(SIZES)) -> str:
    """Write a row for each image, and the images."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        height, width = SIZES[name]
        image = Image.new("RGB", (width, height), (200, 60, 40))
        image.putpixel((0, 0), (0, 0, 255))
        image.save(folder / name)
    return written(folder / "rows.json", [asked(number, name) for number, name in enumerate(names)])


def tiled_content(content: dict[str, Any], llava: str, rows: str, **data: Any) -> dict[str, Any]:
    """Return the content of a recipe for these rows."""
    return content | {
        "model": {"start_from": {"llava": llava}, "quantization": "none"},
        "evaluation": None,
        "data": {"format": "conversations", "path": rows, "max_length": 300, "system_prompt": "", **data},
    }
