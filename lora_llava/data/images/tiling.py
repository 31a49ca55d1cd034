"""Tiles of LLaVA-1.6: an image is seen once as a whole and once in tiles, of which padding is left out."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers.image_processing_utils import select_best_resolution

from lora_llava.data.images.image_id import ImageName

LINE_END = -1
"""Place of the newline vector, which ends each line of patches of the tiles."""


@dataclass(frozen=True)
class Tiling:
    """How a LLaVA-1.6 cuts images into tiles (LLaVA's blog of 2024-01-30; transformers, models/llava_next).

    Attributes:
        grid: The canvases that an image may be scaled to, (height, width) in pixels each, multiples of `tile`.
        tile: Side of a tile in pixels, which is the tower's image size.
        patches: Patches of a tile's side.
    """

    grid: tuple[tuple[int, int], ...]
    tile: int
    patches: int

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - few tilings, each as long-lived as its run
    def canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the canvas of an image: the one that keeps most of its pixels, then the one with the least padding.

        Args:
            size: Height and width of the image in pixels.
        """
        height, width = select_best_resolution(size, list(self.grid))
        return height, width

    def tiles(self, size: tuple[int, int]) -> int:
        """Return the number of tiles of an image, the one of the whole image included."""
        height, width = self.canvas(size)
        return 1 + (height // self.tile) * (width // self.tile)

    def tokens(self, size: tuple[int, int]) -> int:
        """Return the number of `<image>` tokens of an image."""
        rows, columns = self._unpadded(size)
        return self.patches**2 + len(rows) * (len(columns) + 1)

    def features(self, size: tuple[int, int]) -> np.ndarray:
        """Return the patch of each image token.

        The patches of the whole image come first; then, line by line, those of the tiles without the padding, each line
        followed by the newline.

        Args:
            size: Height and width of the image in pixels.

        Returns:
            Int64 of shape (tokens,): indices into the patches of all tiles, tile by tile; `LINE_END` for a newline.
        """
        rows, columns = self._unpadded(size)
        across = self.canvas(size)[1] // self.tile
        row, column = np.array(rows, dtype=np.int64)[:, None], np.array(columns, dtype=np.int64)[None, :]
        tile = 1 + row // self.patches * across + column // self.patches
        places = (tile * self.patches + row % self.patches) * self.patches + column % self.patches
        lines = np.pad(places, ((0, 0), (0, 1)), constant_values=LINE_END)
        return np.concatenate([np.arange(self.patches**2), lines.ravel()])

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def _unpadded(self, size: tuple[int, int]) -> tuple[range, range]:
        """Return the rows and columns of patches that are not padding alone, on the canvas of an image."""
        canvas_height, canvas_width = self.canvas(size)
        height, width = (side // self.tile * self.patches for side in (canvas_height, canvas_width))
        if size[1] / size[0] > width / height:
            padding = (height - int(round(size[0] * (width / size[1]), 7))) // 2
            return range(padding, height - padding), range(width)
        padding = (width - int(round(size[1] * (height / size[0]), 7))) // 2
        return range(height), range(padding, width - padding)


@dataclass(frozen=True)
class TiledImages:
    """Named images with their tiles and tokens.

    Attributes:
        tiling: How the model cuts images into tiles.
        sizes: Height and width of each image in pixels. One that is missing or could not be read, of size (0, 0),
            counts as one of a tile's size.
    """

    tiling: Tiling
    sizes: Mapping[ImageName, tuple[int, int]]

    def tokens(self, names: Sequence[ImageName]) -> list[int]:
        """Return the number of `<image>` tokens of each of these images."""
        return [self.tiling.tokens(self.size(name)) for name in names]

    def tiles(self, names: Sequence[ImageName]) -> list[int]:
        """Return the number of tiles of each of these images, those of the whole images included."""
        return [self.tiling.tiles(self.size(name)) for name in names]

    def size(self, name: ImageName) -> tuple[int, int]:
        """Return the height and width by which an image is counted."""
        size = self.sizes.get(name, (0, 0))
        return size if all(size) else (self.tiling.tile, self.tiling.tile)

    @property
    def limits(self) -> list[int]:
        """The numbers of tiles that canvases have, largest first, that of the whole image not counted."""
        tile = self.tiling.tile
        return sorted({(height // tile) * (width // tile) for height, width in self.tiling.grid}, reverse=True)

    def most_tiles(self, names: Sequence[ImageName], room: int) -> int | None:
        """Return the largest limit of tiles with which these images have at most `room` tokens; None if none has."""
        for most in self.limits:
            if sum(self.with_most(most).tokens(names)) <= room:
                return most
        return None

    def with_most(self, most: int) -> TiledImages:
        """Return the images with at most so many tiles each, that of the whole image not counted."""
        grid = limited(self.tiling.grid, self.tiling.tile, most)
        return replace(self, tiling=replace(self.tiling, grid=grid))


def limited(grid: Sequence[Sequence[int]], tile: int, most: int | None) -> tuple[tuple[int, int], ...]:
    """Return the canvases of a grid that have at most so many tiles, that of the whole image not counted.

    Args:
        grid: Canvases, height and width in pixels.
        tile: Side of a tile in pixels.
        most: Most tiles; None keeps all.
    """
    found = tuple((int(height), int(width)) for height, width in grid)
    return tuple(each for each in found if most is None or (each[0] // tile) * (each[1] // tile) <= most)
