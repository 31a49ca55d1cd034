"""The vision tower: frozen, its features are constant and have no autograd graph; with adapters it trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, LlavaConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lora_llava.data.images.tiling import LINE_END, Tiling
from lora_llava.model.families.tower_families import tiling_of
from lora_llava.model.weights.names import COMPONENTS, NEWLINE_NAME, canonical_name
from lora_llava.model.weights.tensor_files import lazy_tensors


@torch.no_grad()
def tower_features(tower: nn.Module, config: LlavaConfig, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return a frozen tower's patch features; see `trained_features`."""
    return trained_features(tower, config, pixel_values)


def trained_features(tower: nn.Module, config: LlavaConfig, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the patch features for the projector (transformers, models/llava/modeling_llava.py).

    Args:
        tower: A CLIP vision model.
        config: The LLaVA's configuration, with the layer and strategy of the features.
        pixel_values: Shape (images or tiles, 3, height, width).

    Returns:
        Shape (images or tiles, image tokens, features), in the tower's dtype even under autocast.
    """
    layers = config.vision_feature_layer
    with torch.autocast(pixel_values.device.type, enabled=False):
        states = tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    first = 1 if config.vision_feature_select_strategy == "default" else 0  # `default` drops CLIP's CLS
    return torch.cat([layer[:, first:] for layer in chosen], dim=-1)


def run_tower(model: Any, *, trained: bool = False) -> None:
    """Run the tower in its own dtype, and without an autograd graph unless it trains.

    Stock code builds a graph for a frozen tower too, once a hook requires input gradients.

    Args:
        model: A stock LLaVA; changed in place. One of LLaVA-1.6 then takes `pixel_values` of shape (tiles of all
            images, 3, height, width) and `image_sizes`.
        trained: Whether the tower has adapters that train.
    """
    features_of = trained_features if trained else tower_features
    _replace_features(model, lambda pixels: features_of(model.model.vision_tower, model.config, pixels))


def accept_features(model: Any) -> None:
    """Make a model accept image features as its `pixel_values`, and remove its tower.

    Args:
        model: A stock LLaVA; changed in place. Its `pixel_values` then have shape (images, image tokens, features),
            like those of `tower_features`; of a LLaVA-1.6, (tiles of all images, patches, features).
    """
    model.model.vision_tower = None
    _replace_features(model, lambda features: features)


def load_tower(folder: Path, config: LlavaConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load only the vision tower of a LLaVA.

    Args:
        folder: Folder of the LLaVA's weights.
        config: The LLaVA's configuration.
        dtype: Compute dtype.
        device: Compute device.

    Returns:
        The tower in eval mode.
    """
    prefix = COMPONENTS["vision_tower"][0]
    with torch.device("meta"):
        tower: nn.Module = AutoModel.from_config(config.vision_config, dtype=dtype)
    tower.to_empty(device=device)
    found = {canonical_name(tensor.name): tensor for tensor in lazy_tensors(folder)}
    weights = {
        name.removeprefix(prefix): tensor.load().to(device, dtype)
        for name, tensor in found.items()
        if name.startswith(prefix)
    }
    tower.load_state_dict(weights)
    for name, buffer in tower.named_buffers():  # not in checkpoints; the only one is CLIP's position_ids
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.numel(), device=device).view_as(buffer))
    return tower.eval().requires_grad_(False)


def llava_of(model: Any) -> Any:
    """Return the stock LLaVA of a model with or without an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def dtype_of(model: Any) -> torch.dtype:
    """Return the dtype of the frozen weights of a model, with or without an adapter.

    transformers takes that of the first parameter, which may be a newline that an adapter has in float32.
    """
    weights = llava_of(model).named_parameters()
    return next(p.dtype for name, p in weights if name != NEWLINE_NAME and p.is_floating_point())


@contextmanager
def features_as_pixels(model: Any) -> Iterator[None]:
    """Make a model accept image features as its `pixel_values` within a `with` block.

    Args:
        model: A stock LLaVA.
    """
    before = model.model.__dict__.get("get_image_features")
    _replace_features(model, lambda features: features)
    try:
        yield
    finally:
        if before is None:
            del model.model.get_image_features
        else:
            model.model.get_image_features = before


def _replace_features(model: Any, features_of: Any) -> None:
    inner = model.model

    def get_image_features(
        pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        projected = inner.multi_modal_projector(features_of(pixel_values))
        tiling = tiling_of(model.config)  # the recipe may limit it after loading
        if tiling is None:
            return BaseModelOutputWithPooling(pooler_output=list(projected))
        assert image_sizes is not None  # the collators give them for every LLaVA-1.6
        return BaseModelOutputWithPooling(
            pooler_output=in_lines(projected, inner.image_newline, tiling, image_sizes.tolist())
        )

    inner.get_image_features = get_image_features


def in_lines(
    projected: torch.Tensor, newline: torch.Tensor, tiling: Tiling, sizes: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Return the projected features of each image as a LLaVA-1.6 reads them: without padding, each line ended.

    Equal to `pack_image_features` of the stock model (transformers, models/llava_next), by one index for all images.

    Args:
        projected: Features of all tiles of all images, in order, of shape (tiles, patches, hidden).
        newline: Shape (hidden,).
        tiling: The model's tiling.
        sizes: Height and width of each image in pixels.

    Returns:
        For each image, shape (image tokens, hidden).
    """
    rows, first = [], 0
    for height, width in sizes:
        places = torch.from_numpy(tiling.features((height, width)))
        rows.append(places.where(places == LINE_END, places + first))
        first += tiling.tiles((height, width)) * projected.shape[1]
    if first != projected.shape[:2].numel():
        raise ValueError(f"images of {list(sizes)} have {first} patches, and {projected.shape[:2].numel()} were given")
    index = torch.cat(rows)
    index[index == LINE_END] = first
    every = torch.cat([projected.flatten(0, 1), newline[None].to(projected)])
    return list(every.index_select(0, index.to(every.device)).split([len(row) for row in rows]))
