"""Activation checkpointing of the language model's layers, and of nothing else."""

from __future__ import annotations

from typing import Any


def checkpoint_language_model(model: Any) -> None:
    """Recompute the language model's layers in the backward pass.

    Enabled on the whole LLaVA instead, CLIP would recompute and, through peft's input gradients, build a graph too.

    Args:
        model: A `LlavaForConditionalGeneration`.
    """
    language_model = model.model.language_model
    options = {"use_reentrant": False}
    if hasattr(language_model, "activation_checkpointing_enable"):  # the name from transformers 5.2x on
        language_model.activation_checkpointing_enable(options)
    else:
        language_model.gradient_checkpointing_enable(options)
