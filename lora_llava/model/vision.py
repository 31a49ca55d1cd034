"""What the frozen vision tower sees: always the same features, and never a graph."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling


@torch.no_grad()
def tower_features(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """The grid features that the projector translates (transformers, models/llava/modeling_llava.py).

    Args:
        model: A `LlavaForConditionalGeneration`.
        pixel_values: Shape (pictures, 3, height, width).

    Returns:
        Shape (pictures, image tokens, features), in the tower's dtype whatever autocast is on.
    """
    config = model.config
    layers = config.vision_feature_layer
    with torch.autocast(pixel_values.device.type, enabled=False):
        states = model.model.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    first = 1 if config.vision_feature_select_strategy == "default" else 0  # `default` takes CLIP's CLS off
    return torch.cat([layer[:, first:] for layer in chosen], dim=-1)


def freeze_tower(model: Any) -> None:
    """Run the tower without a graph, which stock code builds as soon as a hook asks for input gradients.

    Args:
        model: A `LlavaForConditionalGeneration`; changed in place.
    """
    _replace_features(model, lambda pixel_values: tower_features(model, pixel_values))


def take_features(model: Any) -> None:
    """Let a model take features of pictures as its `pixel_values`, and drop its tower.

    Args:
        model: A `LlavaForConditionalGeneration`; changed in place. Its `pixel_values` are then of shape (pictures,
            image tokens, features), as `tower_features` gives them.
    """
    model.model.vision_tower = None
    _replace_features(model, lambda features: features)


def _replace_features(model: Any, features_of: Any) -> None:
    inner = model.model

    def get_image_features(pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        projected = inner.multi_modal_projector(features_of(pixel_values))
        return BaseModelOutputWithPooling(pooler_output=list(projected))

    inner.get_image_features = get_image_features
