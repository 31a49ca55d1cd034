"""A tiny CLIP tower for models of the tests."""

from __future__ import annotations

from transformers import CLIPVisionConfig


def tiny_tower(
    image_size: int = 32, patch_size: int = 16, *, hidden: int = 32, inner: int = 64, layers: int = 3
) -> CLIPVisionConfig:
    """Return the configuration of a tower.

    Args:
        image_size: Side of its images in pixels.
        patch_size: Side of a patch in pixels.
        hidden: Hidden size.
        inner: Hidden size of its feed-forward layers.
        layers: Number of layers.
    """
    return CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=32,
    )
