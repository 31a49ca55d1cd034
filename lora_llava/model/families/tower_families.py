"""The families of vision towers: one table, their image tokens and image processors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import (
    CONFIG_MAPPING,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    PreTrainedConfig,
    SiglipImageProcessorPil,
)

from lora_llava.core.errors import UserError
from lora_llava.core.json_files import read_object_if_any
from lora_llava.data.images.tiling import Tiling
from lora_llava.model.families.language_families import build_config
from lora_llava.model.families.llava_kinds import TILED

FEATURE_LAYER = -2
"""LLaVA takes the output of the tower's last layer but one."""


@dataclass(frozen=True)
class TowerFamily:
    """What is known of a family of towers.

    Attributes:
        model_type: Its name in transformers.
        class_tokens: Tokens before the patches: CLIP's CLS.
        strategy: `default` drops the first token, `full` keeps all.
        image_processor: The stock image processor on PIL that CLIP or SigLIP itself uses.
        square: Whether that processor scales both sides to the size, rather than the shorter one and then crops.
        statistics: Mean and deviation of pixels where its folder names none; None is CLIP's, the processors' default.
    """

    model_type: str
    class_tokens: int
    strategy: Literal["default", "full"]
    image_processor: type
    square: bool
    statistics: float | None = None


TOWERS = {
    tower.model_type: tower
    for tower in (
        TowerFamily("clip_vision_model", 1, "default", CLIPImageProcessorPil, square=False),
        TowerFamily("siglip_vision_model", 0, "full", SiglipImageProcessorPil, square=True, statistics=0.5),
    )
}
"""By model_type. SigLIP 2's checkpoints of a fixed resolution are SigLIPs."""
_CANVASES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""LLaVA-1.6's canvases: height and width in tiles (image_grid_pinpoints of llava-hf/llava-v1.6-vicuna-7b-hf)."""
_VISION_PARTS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}
_REFUSED = {"siglip2_vision_model": "NaFlex has no fixed grid of patches; name a SigLIP 2 of a fixed resolution"}


def read_vision_config(content: Mapping[str, Any], field: str) -> PreTrainedConfig:
    """Return the configuration of a tower, checked.

    Args:
        content: Its config.json, or that of the model of images and text it is a part of.
        field: The recipe's field, for messages.

    Raises:
        UserError: For a tower that is not in the table, or gives no grid of patches.
    """
    whole = content.get("model_type")
    part = content.get("vision_config")
    vision = dict(part if isinstance(part, Mapping) else content)
    kind = str(vision.get("model_type") or whole or "clip")
    kind = _VISION_PARTS.get(kind, kind)  # files of older versions do not name the part
    vision["model_type"] = kind
    _check_kind(kind, field)
    config: PreTrainedConfig = build_config(CONFIG_MAPPING[kind], vision, f"{field}: config.json is not a {kind}'s")
    check_vision_config(config, field)
    return config


def _check_kind(kind: str, field: str) -> None:
    if kind in _REFUSED:
        raise UserError(f"{field} is a {kind!r}: {_REFUSED[kind]}")
    if kind not in TOWERS:
        raise UserError(f"{field} is a {kind!r} model; the towers that work are {' and '.join(TOWERS)}")


def check_vision_config(config: PreTrainedConfig, field: str) -> None:
    """Refuse a tower that is not in the table or has no square grid of patches.

    Raises:
        UserError: Naming the reason.
    """
    _check_kind(config.model_type, field)
    sizes = config.image_size, config.patch_size
    if not all(isinstance(size, int) and size > 0 for size in sizes) or config.image_size < config.patch_size:
        raise UserError(f"{field}: image_size {sizes[0]} and patch_size {sizes[1]} give no grid of patches")


def tower_of(config: LlavaConfig) -> TowerFamily:
    """Return the family of a LLaVA's tower.

    Raises:
        UserError: For a tower that is not in the table.
    """
    _check_kind(config.vision_config.model_type, "the LLaVA's vision tower")
    return TOWERS[config.vision_config.model_type]


def tiling_of(config: LlavaConfig) -> Tiling | None:
    """Return how a LLaVA-1.6 cuts images into tiles; None for a LLaVA that sees an image at one size.

    Args:
        config: A `LlavaConfig` or a `LlavaNextConfig`.
    """
    if config.model_type != TILED:
        return None
    vision = config.vision_config
    grid = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
    return Tiling(grid, vision.image_size, vision.image_size // vision.patch_size)


def check_tiling(config: LlavaConfig, field: str) -> None:
    """Refuse a LLaVA-1.6 whose tiles or features are not those of LLaVA's.

    Args:
        config: A `LlavaNextConfig`.
        field: The start of messages.

    Raises:
        UserError: Naming the setting.
    """
    tile, grid = config.vision_config.image_size, config.image_grid_pinpoints
    strategy = config.vision_feature_select_strategy
    if strategy != "default" or not tower_of(config).class_tokens:
        raise UserError(
            f"{field}: vision_feature_select_strategy is {strategy!r} and its tower a {config.vision_config.model_type}"
            "; of LLaVA-1.6, 'default' with a CLIP works"
        )
    if not grid or not all(_is_canvas(each, tile) for each in grid):
        raise UserError(
            f"{field}: image_grid_pinpoints is {grid}; each of its canvases needs a height and a width that are "
            f"multiples of the tower's {tile} pixels; restore its config.json"
        )


def canvases_of(grid: Sequence[Sequence[int]] | None, vision: PreTrainedConfig) -> tuple[tuple[int, int], ...]:
    """Return the canvases of a LLaVA-1.6 made of parts.

    Args:
        grid: `model.high_resolution.grid`: a height and a width in pixels each; None is LLaVA-1.6's.
        vision: The tower's configuration.

    Raises:
        UserError: For a tower without CLS, or a canvas that is not made of whole tiles.
    """
    tile = vision.image_size
    if not TOWERS[vision.model_type].class_tokens:
        raise UserError(
            f"model.high_resolution: model.vision_tower is a {vision.model_type}, and LLaVA-1.6 cuts tiles for a CLIP; "
            "name a CLIP, or leave model.high_resolution out"
        )
    for canvas in grid or ():
        if not _is_canvas(canvas, tile):
            raise UserError(
                f"model.high_resolution.grid: the canvas {list(canvas)} is not made of whole tiles; its height and "
                f"width have to be multiples of the tower's {tile} pixels, as in [{tile}, {2 * tile}]"
            )
    return tuple((h, w) for h, w in grid) if grid else tuple((h * tile, w * tile) for h, w in _CANVASES)


def _is_canvas(value: Any, tile: int) -> bool:
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    return pair and all(isinstance(side, int) and side > 0 and side % tile == 0 for side in value)


def image_tokens(config: LlavaConfig) -> int:
    """Return the number of `<image>` tokens of one tile as stock model and processor count them.

    That is the number of an image, unless the model sees it in tiles besides (`tokens_of_image`).
    """
    vision = config.vision_config
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    return int((vision.image_size // vision.patch_size) ** 2) + tower_of(config).class_tokens - dropped


def tokens_of_image(config: LlavaConfig, size: tuple[int, int]) -> int:
    """Return the number of `<image>` tokens of an image.

    Args:
        config: Configuration of the LLaVA.
        size: Height and width of the image in pixels; only a LLaVA-1.6's number depends on them.
    """
    tiling = tiling_of(config)
    return image_tokens(config) if tiling is None else tiling.tokens(size)


def image_processor_of(folder: Path, config: LlavaConfig, aspect: str = "pad") -> Any:
    """Return the tower's image processor on PIL, as CLIP, SigLIP and LLaVA use it, whatever else is installed.

    Args:
        folder: The vision tower's folder, or a base folder; its preprocessor_config.json is read if there is one.
        config: The LLaVA's configuration, with the image size.
        aspect: `pad` pads images to a square with the mean colour; `crop` does what the tower's own processor does:
            CLIP's crops the centre, SigLIP's scales both sides to the size. A LLaVA-1.6 cuts tiles in place of both.

    Returns:
        A stock image processor; for a LLaVA-1.6 the one that cuts images into tiles.
    """
    tower, size = tower_of(config), config.vision_config.image_size
    square = {"height": size, "width": size}
    settings: dict[str, Any] = {"size": {"shortest_edge": size}, "crop_size": square}
    if tower.statistics is not None:
        settings |= {"image_mean": [tower.statistics] * 3, "image_std": [tower.statistics] * 3}
    for name in ("preprocessor_config.json", "processor_config.json"):
        saved = read_object_if_any(folder / name)
        saved = saved.get("image_processor", saved)
        settings |= {key: saved[key] for key in ("image_mean", "image_std", "resample") if key in saved}
    if (tiling := tiling_of(config)) is not None:
        return LlavaNextImageProcessorPil(image_grid_pinpoints=[list(canvas) for canvas in tiling.grid], **settings)
    if aspect != "crop":
        return LlavaImageProcessorPil(do_pad=True, **settings)
    if tower.square:
        settings = {key: value for key, value in settings.items() if key != "crop_size"} | {"size": square}
    return tower.image_processor(**settings)


_KIND = "image_processor_type"
_SAVED_KINDS = {
    "LlavaImageProcessor": LlavaImageProcessorPil,
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "CLIPFeatureExtractor": CLIPImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "LlavaNextImageProcessor": LlavaNextImageProcessorPil,
}
"""Stock image processors on PIL, by the name that a saved one has; `Fast` and `Pil` at its end are left out."""


def saved_image_processor(folder: Path, config: LlavaConfig) -> Any:
    """Return the image processor that a complete LLaVA was saved with, on PIL.

    Args:
        folder: The LLaVA's folder.
        config: Its configuration.

    Returns:
        A stock image processor with all settings of the saved one; one that pads to a square if the folder has none.

    Raises:
        UserError: For a processor of another kind, or whose images do not have the tower's size.
    """
    saved, tiling = saved_image_settings(folder), tiling_of(config)
    if saved is None and tiling is not None:
        raise UserError(f"{folder} has no preprocessor_config.json, which says how it cuts images; restore it")
    if saved is None:
        return image_processor_of(folder, config)
    fix = "set data.image_aspect to pad or crop" if tiling is None else "restore its preprocessor_config.json"
    field = f"data.image_aspect is auto, but the image processor of {folder}"
    named = saved.get(_KIND) or saved.get("feature_extractor_type") or "CLIPImageProcessor"
    kind = _SAVED_KINDS.get(str(named).removesuffix("Fast").removesuffix("Pil"))
    fitting = [
        name for name, each in _SAVED_KINDS.items() if (each is LlavaNextImageProcessorPil) == (tiling is not None)
    ]
    if kind is None or str(named).removesuffix("Fast").removesuffix("Pil") not in fitting:
        raise UserError(f"{field} is a {named}; those that work are {', '.join(fitting)}; {fix}")
    if tiling is not None:
        _check_grid(saved, tiling, field)
        saved["image_grid_pinpoints"] = [list(canvas) for canvas in tiling.grid]
    try:
        processor = kind(**{key: value for key, value in saved.items() if key in kind().to_dict() and key != _KIND})
        tries = [processor([np.zeros((*sides, 3), np.uint8)])["pixel_values"][0] for sides in ((5, 9), (9, 5))]
        shapes = {one.shape for each in tries for one in (each if tiling is not None else [each])}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{field} cannot be used ({' '.join(str(error).split())}); {fix}") from None
    size = config.vision_config.image_size
    if shapes != {(3, size, size)}:
        found = " or ".join("x".join(map(str, shape[1:])) for shape in sorted(shapes))
        raise UserError(f"{field} gives {found} pixels, and its tower takes {size}x{size}; {fix}")
    return processor


def _check_grid(saved: Mapping[str, Any], tiling: Tiling, field: str) -> None:
    """Refuse an image processor that lacks a canvas of the config: the model would expect other tiles."""
    found = saved.get("image_grid_pinpoints", LlavaNextImageProcessorPil.image_grid_pinpoints)
    missing = [canvas for canvas in tiling.grid if not isinstance(found, list) or list(canvas) not in found]
    if missing:
        raise UserError(
            f"{field} has no canvas {missing[0]} in its image_grid_pinpoints, as config.json has; restore both files"
        )


def saved_image_settings(folder: Path) -> dict[str, Any] | None:
    """Return the saved settings of an image processor, from the file that transformers reads; None if there is none."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        saved = read_object_if_any(folder / name)
        found = saved.get("image_processor") if name == "processor_config.json" else saved
        if found:
            return dict(found)
    return None


def describe_images(image_processor: Mapping[str, Any]) -> str:
    """Return how an image becomes the tower's size, in a word or two, from the settings of an image processor."""
    if image_processor.get("image_grid_pinpoints"):
        return "tiles"
    if image_processor.get("do_pad"):
        return "pad"
    return "crop" if image_processor.get("do_center_crop") else "scale both sides"
