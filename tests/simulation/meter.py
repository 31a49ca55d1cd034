"""Count what torch's allocator would hand out on a card whose tensors have shapes and no bytes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK = 512
"""The caching allocator rounds sizes to this many bytes (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)."""


class Meter(TorchDispatchMode):
    """Counts the bytes of live storages on the card, and answers what a program reads back from it.

    Attributes:
        total: Bytes that are allocated now.
        peak: Most bytes that were allocated at once, temporaries inside kernels included.
        peak_at: The operator at the peak.
        events: Allocations and frees as (+ or -, storage, bytes), if `record` is set.

    Args:
        trained: The whole number that is read from the card: how many true values a mask has, or a sum of labels. A
            float is 1, a boolean true.
        limit: Bytes of the card; more raise torch's out-of-memory error.
    """

    def __init__(self, trained: int = 1, limit: int | None = None) -> None:
        super().__init__()
        self.trained, self.limit = trained, limit
        self.total = self.peak = 0
        self.peak_at = ""
        self.record = False
        self.events: list[tuple[str, int, int]] = []
        self._live: dict[int, int] = {}

    def reset_peak(self) -> None:
        """Count the peak from here."""
        self.peak, self.peak_at = self.total, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name == "aten._local_scalar_dense.default" and getattr(args[0], "constant", None) is None:
            return self._number(args[0].dtype)
        if name == "aten.nonzero.default":
            result = torch.empty((self.trained, args[0].ndim), dtype=torch.long, device=args[0].device)
        else:
            _forget_values(args, kwargs or {})
            result = func(*self._without_masks(name, args), **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self._take(each)
        self._note_peak(name, kernel_temporaries(name, args))
        return result

    def _number(self, dtype: torch.dtype) -> bool | float | int:
        if dtype == torch.bool:
            return True
        return 1.0 if dtype.is_floating_point else self.trained

    def _without_masks(self, name: str, args: Any) -> Any:
        """Replace a boolean index, whose result has no shape on a fake tensor, by as many indices as it is to have."""
        if name != "aten.index.Tensor":
            return args
        mask = next((index for index in args[1] if index is not None and index.dtype == torch.bool), None)
        if mask is None:
            return args
        return args[0], [torch.empty(self.trained, dtype=torch.long, device=mask.device) for _ in range(mask.ndim)]

    def _take(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if tensor.device.type != "cuda" or key in self._live or size == 0:
            return
        if self.limit is not None and self.total + size > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB.")
        self._live[key] = size
        self.total += size
        if self.record:
            self.events.append(("+", key, size))
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        size = self._live.pop(key, 0)
        self.total -= size
        if self.record:
            self.events.append(("-", key, size))

    def _note_peak(self, name: str, temporaries: int) -> None:
        if self.record and temporaries:
            self.events += [("+", -1, temporaries), ("-", -1, temporaries)]
        if self.total + temporaries > self.peak:
            self.peak, self.peak_at = self.total + temporaries, name


def _forget_values(args: Any, kwargs: dict[str, Any]) -> None:
    """Forget the values of small fake tensors that are copied to the card, where torch would compute with them."""
    if "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == "cuda":
        for each in args:
            if getattr(each, "constant", None) is not None:
                each.constant = None


def kernel_temporaries(name: str, args: Any) -> int:
    """Return the bytes that a kernel takes from torch's allocator inside, and gives back; no fake kernel shows them."""
    if name == "bitsandbytes.gemm_4bit.default":
        return _dequantized_bytes(args)
    if name == "torch_attn._varlen_attn.default":
        check_varlen(args)
    if name == "torch_attn._varlen_attn_backward.default":
        return _varlen_backward_bytes(args)
    return 0


def _dequantized_bytes(args: Any) -> int:
    """bitsandbytes/backends/cuda/ops.py, _dequant_linear_fallback: the weight in 16 bits, and float32 scales, twice."""
    x, _, shape = args[:3]
    if x.numel() // x.shape[-1] <= 1536:  # up to so many tokens its kernel reads the 4-bit weight
        return 0
    weights = shape[0] * shape[1]
    return int(weights * x.element_size() + 2 * 4 * (weights // 64))


def check_varlen(args: Any) -> None:
    """Check what flash_api.cpp checks of its inputs."""
    q, k, v, ends = args[:4]
    assert q.dtype in (torch.bfloat16, torch.float16), q.dtype
    assert q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
    assert ends.dtype == torch.int32, ends.dtype
    assert ends.is_contiguous()
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))


def _varlen_backward_bytes(args: Any) -> int:
    """ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_varlen_bwd: dQ in float32, and contiguous inputs."""
    gradient, q, output = args[0], args[1], args[4]
    tokens, heads, size = q.shape
    samples = args[6].numel() - 1
    accumulated = 4 * (tokens + 128 * samples) * heads * (size + 1)
    copies = sum(each.numel() * each.element_size() for each in (gradient, output) if not each.is_contiguous())
    return int(accumulated + copies)
