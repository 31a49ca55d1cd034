"""What is not supported yet for a LLaVA-1.6, which sees images in tiles."""

from __future__ import annotations

from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.model.families.tower_families import tiling_of
from lora_llava.recipe import Recipe


def check_tiled(recipe: Recipe, config: LlavaConfig) -> None:
    """Refuse a recipe with a setting that does not work yet with a LLaVA-1.6.

    Args:
        recipe: The recipe.
        config: Configuration of its model.

    Raises:
        UserError: Naming the setting and the reason.
    """
    if tiling_of(config) is None:
        return
    aspect = recipe.data.image_aspect
    refused = {
        f"data.image_aspect is {aspect}, and a LLaVA-1.6 cuts images into tiles itself; set it to auto": aspect
        != "auto",
        "stage is 1, which trains the projector of assembled models; a LLaVA-1.6 has a trained one: set stage to 2": (
            recipe.stage == 1 and recipe.model.high_resolution is None
        ),
    }
    for reason, found in refused.items():
        if found:
            raise UserError(reason)
