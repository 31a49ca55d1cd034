"""Count the bytes that autograd keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlavaConfig

from tests.tiny_tower import tiny_tower


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes that autograd keeps after `run`, each storage once and without the model's weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    holding: list[Any] = []  # otherwise the address of a freed storage is reused

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            holding.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        holding.append(run())
    return sum(kept.values())


def small_config(layers: int = 3, inner: int = 344) -> LlavaConfig:
    """Return the configuration of a small LLaVA whose widths NF4 can pack."""
    text = LlamaConfig(
        hidden_size=128, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4, vocab_size=500
    )
    vision = tiny_tower(28, 14, hidden=64, inner=128, layers=2)
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=499, image_seq_length=4)
