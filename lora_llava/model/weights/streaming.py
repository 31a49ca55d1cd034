"""Run a stock model with weights loaded from disk block by block, in the memory of one block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import LlavaConfig

from lora_llava.model.families.llava_kinds import llava_class

Load = Callable[[str], torch.Tensor]
_NEWLINE = "image_newline"


def build_empty(config: LlavaConfig, device: torch.device | str = "cpu") -> Any:
    """Return a LLaVA without weights: parameters on the meta device, real buffers on `device`."""
    with init_empty_weights(include_buffers=False):
        model = llava_class(config)(config).eval()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model


def stream_weights(
    model: nn.Module, load: Load, *, keep: bool = False, progress: Callable[[str], None] = lambda block: None
) -> None:
    """Load every block's weights before it runs and remove them afterwards.

    A LLaVA-1.6's newline is loaded at once: it belongs to no block, and `generate` reads it before any block runs.

    Args:
        model: A LLaVA or its PEFT model, with parameters on the meta device.
        load: Returns the weight of a parameter by name, on its device and in its dtype.
        keep: Keep the weights, for a model that fits in memory.
        progress: Called with the name of every block that runs.
    """
    for name, module in model.named_modules():
        if _NEWLINE in module._parameters:
            module._parameters[_NEWLINE] = nn.Parameter(load(f"{name}.{_NEWLINE}"), requires_grad=False)
    for name, block in _blocks(model):
        _stream_block(name, block, load, keep, progress)


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the blocks: decoder layers, the vision tower, and elsewhere the modules that own parameters."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        inside = any(name.startswith(f"{block}.") for block, _ in found)
        # A token adapter reads the matrix of the layer in it, without running that layer.
        is_block = parent.endswith("language_model.layers") or name.endswith(("vision_tower", ".token_adapter"))
        owns = any(each is not None for key, each in module._parameters.items() if key != _NEWLINE)
        if not inside and (is_block or owns):
            found.append((name, module))
    return found


def _stream_block(name: str, block: nn.Module, load: Load, keep: bool, progress: Callable[[str], None]) -> None:
    empty = {key: parameter for key, parameter in block.named_parameters() if parameter.is_meta}

    def before(module: nn.Module, inputs: Any) -> None:
        progress(name)
        for key, parameter in empty.items():
            owner, _, leaf = key.rpartition(".")
            place = module.get_submodule(owner)
            if getattr(place, leaf).is_meta:
                value = load(f"{name}.{key}")
                if value.shape != parameter.shape:
                    raise ValueError(f"{name}.{key} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
                place._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        for key, parameter in empty.items():
            owner, _, leaf = key.rpartition(".")
            module.get_submodule(owner)._parameters[leaf] = parameter

    block.register_forward_pre_hook(before)
    if not keep:
        block.register_forward_hook(after)
