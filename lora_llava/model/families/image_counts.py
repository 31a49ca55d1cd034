"""Counts of image tokens, which depend on the sizes of images for a model with tiles, and the limit of its tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.data.images.image_id import ImageName
from lora_llava.data.images.tiling import TiledImages, limited
from lora_llava.model.families.tower_families import image_tokens, tiling_of

Sizes = Mapping[ImageName, tuple[int, int]]
"""Height and width of images in pixels, by name; (0, 0) for one that cannot be read."""
TokensOf = Callable[[Sequence[ImageName]], int | list[int]]
"""Returns the number of `<image>` tokens of each of these images; one number if all images have as many."""


def tokens_of(config: LlavaConfig, sizes: Sizes) -> TokensOf:
    """Return the function that counts the tokens of images.

    Args:
        config: The model's config.
        sizes: The sizes of the images; needed for a model with tiles only.
    """
    tiling, each = tiling_of(config), image_tokens(config)
    if tiling is None:
        return lambda names: each
    return TiledImages(tiling, sizes).tokens


def grid_of(config: LlavaConfig) -> list[list[int]]:
    """Return the canvases of a model with tiles, each a height and a width in pixels; none for another model."""
    tiling = tiling_of(config)
    return [] if tiling is None else [list(canvas) for canvas in tiling.grid]


def limit_tiles(config: LlavaConfig, most: int | None) -> None:
    """Limit the canvases of a model with tiles to those of at most so many tiles.

    Args:
        config: The model's config, which is changed.
        most: The recipe's `model.max_tiles`; None changes nothing.

    Raises:
        UserError: If the model has no tiles, or no canvas is left.
    """
    if most is None:
        return
    tiling = tiling_of(config)
    if tiling is None:
        raise UserError(f"model.max_tiles is {most}, but the model has no tiles, as LLaVA-1.6 has; remove the key")
    grid = limited(tiling.grid, tiling.tile, most)
    if not grid:
        fewest = min(height // tiling.tile * (width // tiling.tile) for height, width in tiling.grid)
        raise UserError(f"model.max_tiles is {most}, but the model's smallest canvas has {fewest} tiles; set {fewest}")
    config.image_grid_pinpoints = [list(canvas) for canvas in grid]
