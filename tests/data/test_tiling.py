"""Tiles and image tokens of LLaVA-1.6 are those of the stock processor and model."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextModel, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from lora_llava.data.images.tiling import LINE_END, TiledImages, Tiling, limited

GRID = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""LLaVA-1.6's (config.json of llava-hf/llava-v1.6-vicuna-7b-hf)."""
TILING = Tiling(GRID, 336, 24)


def sizes() -> list[tuple[int, int]]:
    """Heights and widths: usual ones, slivers, squares, and drawn ones."""
    chosen = [(336, 336), (480, 640), (1, 2000), (2000, 1), (1, 1), (335, 337), (672, 672), (1008, 337), (3024, 4032)]
    generator = random.Random(0)
    return chosen + [(generator.randint(1, 1500), generator.randint(1, 1500)) for _ in range(60 - len(chosen))]


@pytest.fixture(scope="module")
def processor(demo_tokenizer: Any) -> LlavaNextProcessor:
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_grid_pinpoints=[list(s) for s in GRID],
    )
    return LlavaNextProcessor(
        pixels,
        demo_tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def test_tokens_of_60_sizes_are_those_of_the_stock_processor(processor: LlavaNextProcessor) -> None:
    wanted = processor._get_num_multimodal_tokens(image_sizes=[list(size) for size in sizes()])["num_image_tokens"]
    assert [TILING.tokens(size) for size in sizes()] == wanted
    assert [len(TILING.features(size)) for size in sizes()] == wanted
    assert max(wanted) <= 2880 + 48


@pytest.mark.parametrize("size", [(40, 60), (300, 100), (1, 90), (700, 700)])
def test_ids_and_tiles_are_those_of_the_stock_processor(processor: LlavaNextProcessor, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size[::-1], "red")
    batch = processor(images=image, text="<image>", return_tensors="pt")
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert int((batch["input_ids"] == image_id).sum()) == TILING.tokens(size)
    assert batch["pixel_values"].shape[1] == TILING.tiles(size)


def test_features_are_those_of_the_stock_model() -> None:
    tiling = Tiling(((8, 16), (16, 8), (16, 16), (24, 8), (8, 24)), 8, 4)
    config = LlavaNextConfig(
        text_config=LlamaConfig(
            hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=2
        ),
        image_grid_pinpoints=[list(canvas) for canvas in tiling.grid],
    )
    model = LlavaNextModel(config)
    for size in [(5, 9), (30, 31), (31, 30), (1, 50), (50, 1), (16, 16), (17, 8), (8, 24), (9, 23)]:
        projected = torch.randn(tiling.tiles(size), 16, 6)
        wanted, _ = model.pack_image_features([projected], torch.tensor([size]), "default", model.image_newline)
        table = torch.cat([projected.flatten(0, 1), model.image_newline[None]])  # -1 is the last: the newline
        assert torch.equal(table[torch.from_numpy(tiling.features(size))], wanted[0]), size
    assert LINE_END == -1


def test_a_grid_can_be_limited() -> None:
    assert limited(GRID, 336, None) == GRID
    assert limited(GRID, 336, 2) == ((336, 672), (672, 336))
    assert limited(GRID, 336, 1) == ()


def test_padding_is_never_a_token() -> None:
    for size in sizes():
        places = TILING.features(size)[576:]
        lines = np.split(places, np.flatnonzero(places == LINE_END) + 1)[:-1]
        assert {line[-1] for line in lines} <= {LINE_END}
        assert len({len(line) for line in lines}) <= 1  # none for a sliver, which is all padding
        assert places.max(initial=0) < TILING.tiles(size) * 576


def test_the_largest_limit_of_tiles_that_fits_is_found() -> None:
    images = TiledImages(TILING, {"square": (900, 900), "tall": (1008, 337), "bad": (0, 0)})
    sizes = [(900, 900), (1008, 337), (336, 336)]
    assert images.tokens(["square", "tall", "bad"]) == [TILING.tokens(size) for size in sizes]
    assert images.tokens(["unknown"]) == images.tokens(["bad"])
    for room, most in ((10**6, 4), (5304, 4), (5303, 3), (3552, 3), (3551, 2), (2568, 2), (2567, None)):
        assert images.most_tiles(["square", "tall"], room) == most
