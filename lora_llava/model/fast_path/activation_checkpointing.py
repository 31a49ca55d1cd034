"""Activation checkpointing of the language model's layers, and of nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def checkpoint_language_model(model: Any, layers: int | None = None, offload: bool = False) -> None:
    """Recompute the language model's first layers in the backward pass.

    Enabled on the whole LLaVA instead, CLIP would recompute and, through peft's input gradients, build a graph too.

    Args:
        model: A `LlavaForConditionalGeneration`.
        layers: How many; None for all of them.
        offload: Keep the inputs of those layers in the host's memory meanwhile.
    """
    language_model = model.model.language_model
    if layers == 0:
        return
    options = {"use_reentrant": False}
    if hasattr(language_model, "activation_checkpointing_enable"):  # the name from transformers 5.2x on
        language_model.activation_checkpointing_enable(options)
    else:
        language_model.gradient_checkpointing_enable(options)
    for index, layer in enumerate(language_model.layers):
        layer.gradient_checkpointing = layers is None or index < layers
        if offload:
            layer._gradient_checkpointing_func = _offloaded


def _offloaded(function: Any, *inputs: Any) -> Any:
    """A checkpoint whose inputs wait in the host's memory: the hooks see them, and nothing of what runs inside."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *inputs, use_reentrant=False)
