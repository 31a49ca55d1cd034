"""Frozen 4-bit weights that stay in host memory, and are copied to the device one layer ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

BUFFERS = 2
"""Layers on the device at once: the one that is computed, and the next one."""
_ALIGNMENT = 256
"""Bytes at whose multiples each weight begins, as kernels read several bytes at once."""


class HostWeights:
    """Copies the weights of some layers to the device when they are needed.

    A layer's weights are views of one of two buffers for good, so that autograd keeps no copy of them. Layer i uses
    buffer i % 2. It is filled before the layer's forward pass and before its backward pass, on a stream of its own,
    while the layer before it is computed.

    Args:
        layers: The layers, in the order of the forward pass; their 4-bit weights are moved to host memory.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        device = _weights(layers[0])[0].device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        moved = [_to_host(layer) for layer in layers]  # all leave the device before the buffers are made
        self._host = [packed for packed, _ in moved]
        size = max(each.numel() for each in self._host)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]
        self._present = [-1] * BUFFERS
        for index, (layer, (_, parts)) in enumerate(zip(layers, moved, strict=True)):
            _view(layer, parts, self._buffers[index % BUFFERS])
            layer.register_forward_pre_hook(lambda *_, index=index: self._use(index, index + _direction()))
            layer.register_forward_hook(lambda *call, index=index: self._before_backward(call[-1], index))

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(each.numel() for each in self._host)

    def _before_backward(self, output: Any, index: int) -> None:
        """Let the backward pass of a layer, which begins at its output, find the layer's weights."""
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad:
            states.register_hook(lambda _: self._use(index, index - 1))

    def _use(self, index: int, following: int) -> None:
        """Wait until a layer is on the device, and begin to copy the one that follows."""
        self._copy(index)
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        if 0 <= following < len(self._host):
            self._copy(following)

    def _copy(self, index: int) -> None:
        place, packed = index % BUFFERS, self._host[index]
        if self._present[place] == index:
            return
        self._present[place] = index
        target = self._buffers[place][: packed.numel()]
        if self._stream is None:
            target.copy_(packed)
            return
        self._stream.wait_stream(torch.cuda.current_stream())  # the layer that used the buffer is computed by then
        with torch.cuda.stream(self._stream):
            target.copy_(packed, non_blocking=True)


def _direction() -> int:
    """Return 1 in a forward pass, and -1 in a backward one.

    Before 5.23, transformers calls the hooks of a recomputed layer there (transformers/modeling_layers.py).
    """
    return 1 if torch._C._current_graph_task_id() == -1 else -1  # as torch/utils/checkpoint.py asks


def keep_in_host_memory(language_model: Any, layers: int) -> HostWeights | None:
    """Keep the 4-bit weights of a language model's first layers in host memory, pinned where there is a GPU.

    Outside a layer's forward and backward pass its weights are not to be read.

    Args:
        language_model: The language model, on its device.
        layers: How many layers; fewer than three save nothing.

    Returns:
        What copies them; None for no layer.
    """
    return HostWeights(list(language_model.layers[:layers])) if layers else None


def _weights(layer: nn.Module) -> list[Any]:
    """Return a layer's 4-bit weights."""
    return [each for each in layer.parameters() if getattr(each, "quant_state", None) is not None]


@dataclass(frozen=True)
class _Part:
    """Where a tensor is within a layer's bytes."""

    start: int
    end: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, packed: torch.Tensor) -> torch.Tensor:
        return packed[self.start : self.end].view(self.dtype).view(self.shape)


def _to_host(layer: nn.Module) -> tuple[torch.Tensor, list[_Part]]:
    """Move a layer's packed values and 8-bit scales to host memory, one behind the other.

    What is left of the quantization states is small: tables, and the scales of the scales.
    """
    parts: list[_Part] = []
    tensors = [tensor for weight in _weights(layer) for tensor in (weight.data, weight.quant_state.absmax)]
    end = 0
    for tensor in tensors:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + tensor.numel() * tensor.element_size()
        parts.append(_Part(start, end, tensor.dtype, tensor.shape))
    packed = torch.zeros(end, dtype=torch.uint8, device="cpu")
    for tensor, part in zip(tensors, parts, strict=True):
        part.of(packed).copy_(tensor)
    for weight in _weights(layer):
        weight.data, weight.quant_state.absmax = weight.data.new_empty(0), weight.quant_state.absmax.new_empty(0)
    return packed.pin_memory() if torch.cuda.is_available() else packed, parts


def _view(layer: nn.Module, parts: list[_Part], buffer: torch.Tensor) -> None:
    """Let a layer's 4-bit weights be views of a buffer."""
    for weight, data, scales in zip(_weights(layer), parts[::2], parts[1::2], strict=True):
        weight.data, weight.quant_state.absmax = data.of(buffer), scales.of(buffer)
