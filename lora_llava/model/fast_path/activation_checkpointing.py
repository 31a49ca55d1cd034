"""Activation checkpointing of the language model's layers only."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def checkpoint_language_model(model: Any, layers: int | None = None, offload: bool = False) -> None:
    """Recompute the language model's first layers in the backward pass.

    Enabled on the complete LLaVA, CLIP would be recomputed too and, through peft's input gradients, build a graph.

    Args:
        model: A `LlavaForConditionalGeneration`.
        layers: How many layers; None for all of them.
        offload: Keep the inputs of those layers in host memory until the backward pass.
    """
    language_model = model.model.language_model
    if layers == 0:
        return
    options = {"use_reentrant": False}
    if hasattr(language_model, "activation_checkpointing_enable"):  # newer versions of transformers
        language_model.activation_checkpointing_enable(options)
    else:
        language_model.gradient_checkpointing_enable(options)
    for index, layer in enumerate(language_model.layers):
        layer.gradient_checkpointing = layers is None or index < layers
        if offload:
            layer._gradient_checkpointing_func = _offloaded


def _offloaded(function: Any, *inputs: Any) -> Any:
    """Checkpoint a function and keep its inputs in host memory; tensors inside the function are not affected."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *inputs, use_reentrant=False)
