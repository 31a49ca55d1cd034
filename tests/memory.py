"""What autograd keeps, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that autograd holds on to after `run`, each storage once and the model's weights not at all."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    holding: list[Any] = []  # or a freed storage's address would come again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            holding.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        holding.append(run())
    return sum(kept.values())
