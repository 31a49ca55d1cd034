"""Let `torch.cuda` answer as if there were one card, in a process that was started with the device guard."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import numpy as np
import torch
from torch._subclasses import FakeTensorMode, fake_impls, fake_tensor

from tests.simulation.meter import Meter

_NOTHING = (
    "set_device",
    "synchronize",
    "empty_cache",
    "manual_seed",
    "manual_seed_all",
    "set_rng_state",
    "set_rng_state_all",
    "reset_peak_memory_stats",
    "set_per_process_memory_fraction",
    "_lazy_init",
    "_lazy_call",
    "init",
)


class FakeMode(FakeTensorMode):
    """Tensors without bytes; no device is touched, although torch believes in one."""

    avoid_device_init = True  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        # torch's weak references to storages of constants damage the heap when they are collected (torch 2.13)
        converter: Any = self.fake_tensor_converter
        converter.add_constant_storage_mapping = lambda tensor: None


@torch.library.custom_op("fake_card::silu_backward", mutates_args=())
def _silu_backward(gradient: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gradient)


@_silu_backward.register_fake
def _(gradient: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gradient)


def pretend(card: int, capability: tuple[int, int] = (8, 9)) -> list[Meter]:
    """Let `torch.cuda` answer as if there were one card.

    Args:
        card: Its bytes.
        capability: Its compute capability.

    Returns:
        A list for one meter, by which memory is answered.
    """
    meters: list[Meter] = []
    cuda: Any = torch.cuda

    def counted(name: str) -> int:
        return int(getattr(meters[0], name)) if meters else 0

    properties = types.SimpleNamespace(
        total_memory=card,
        name="fake",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=128,
        warp_size=32,
        gcnArchName="",
    )
    fixed: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": capability,
        "get_device_name": "fake",
        "get_device_properties": properties,
        "is_bf16_supported": True,
        "is_initialized": True,
        "get_rng_state_all": [],
        **dict.fromkeys(_NOTHING),
        "get_per_process_memory_fraction": 1.0,
    }
    for name, value in fixed.items():
        setattr(cuda, name, lambda *args, _value=value, **kwargs: _value)
    cuda.get_rng_state = lambda *args: torch.zeros(16, dtype=torch.uint8)
    cuda.memory_allocated = cuda.memory_reserved = lambda *args: counted("total")
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda *args: counted("peak")
    cuda.mem_get_info = lambda *args: (card - counted("total"), card)
    cuda.device = lambda *args, **kwargs: contextlib.nullcontext()
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    cuda.Stream = cuda.current_stream = lambda *args: stream
    cuda.stream = lambda *args: contextlib.nullcontext()
    cuda.default_generators = ()
    fake_tensor.init_gpu_context = lambda *args, **kwargs: None
    torch._C._set_only_lift_cpu_tensors(True)
    for reading in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
        fake_impls.op_implementations_dict[reading] = _number
    _adapt_torch()
    return meters


def _number(mode: Any, func: Any, tensor: torch.Tensor) -> bool | float | int:
    """What an operator reads that is made of others; numbers that a program reads itself come from the meter."""
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1


def _adapt_torch() -> None:
    """Replace what fake CUDA tensors cannot do, or do with other operators than a card."""
    aten: Any = torch.ops.aten
    aten.silu_backward = _silu_backward  # one kernel on a card, four operators on fake tensors
    torch.nn.functional.scaled_dot_product_attention = _attention  # type: ignore[assignment]
    torch.Tensor.pin_memory = lambda tensor, *args: tensor  # type: ignore[method-assign]
    torch.nn.Module._apply = _apply  # type: ignore[method-assign]
    numpy_of, generator = torch.Tensor.numpy, torch.Generator

    def as_numpy(tensor: torch.Tensor, **options: Any) -> Any:
        is_fake = isinstance(tensor, fake_tensor.FakeTensor)
        return np.ones(tuple(tensor.shape), np.float32) if is_fake else numpy_of(tensor, **options)

    torch.Tensor.numpy = as_numpy  # type: ignore[method-assign]

    class OnCpu(generator):  # type: ignore[misc,valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator.__new__(cls, "cpu")

    torch.Generator = OnCpu  # type: ignore[misc]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """SDPA as a card chooses it: FlashAttention without a mask, the memory-efficient kernel with one."""
    aten = torch.ops.aten
    if key.shape[1] != query.shape[1]:
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]


def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
    """`nn.Module._apply` without its swapping of tensors, which fake ones do not take."""
    for module in self.children() if recurse else ():
        module._apply(fn)
    for key, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                applied = fn(parameter)
            if (applied.device, applied.dtype) != (parameter.device, parameter.dtype):
                self._parameters[key] = torch.nn.Parameter(applied.detach(), parameter.requires_grad)
    for key, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[key] = fn(buffer)
    return self
