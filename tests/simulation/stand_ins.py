"""What cannot run on fake tensors, replaced by what takes the same memory."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import LlavaConfig

from lora_llava.model import random_weights
from lora_llava.model.weights.streaming import build_empty


def install() -> None:
    """Replace the packing of 4-bit weights, the empty model and Triton's kernels in this process."""
    from trl.kernels import chunked_logprob

    random_weights._quantized = quantized
    random_weights.build_empty = empty_model
    kernels: Any = chunked_logprob
    kernels._TRITON_AVAILABLE = True  # as on a card; its kernels work in place and take nothing
    kernels._forward_kernel = kernels._backward_kernel = _Kernel()
    kernels.triton = types.SimpleNamespace(cdiv=lambda a, b: -(-a // b))


def really(function: Any) -> Any:
    """Let a function compute with real tensors: to read a file, or to draw numbers that a program looks at."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            kwargs.pop("device", None)
            return function(*args, **kwargs)

    return called


class _Kernel:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


def quantized(weight: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None = None) -> nn.Module:
    """bitsandbytes' layer with an NF4 weight and its scales; `Params4bit` takes no fake tensor.

    Args:
        weight: Shape (outputs, inputs); freed.
        dtype: Compute dtype.
        bias: On the meta device; kept.
    """
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    shape, count, device = weight.shape, weight.numel(), weight.device
    del weight
    with _disable_current_modes():
        layer: Any = bnb.nn.Linear4bit(
            shape[1], shape[0], bias=bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
    blocks = count // 64
    scales = QuantState(
        absmax=torch.empty(-(-blocks // 256), device=device),
        blocksize=256,
        code=torch.empty(256, device=device),
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8, device=device),
        shape=shape,
        dtype=dtype,
        blocksize=64,
        code=torch.empty(16, device=device),
        quant_type="nf4",
        offset=torch.empty((), device=device),
        state2=scales,
    )
    packed: Any = nn.Parameter(torch.empty((count // 2, 1), dtype=torch.uint8, device=device), requires_grad=False)
    packed.quant_state, packed.compress_statistics, packed.quant_type = state, True, "nf4"
    packed.blocksize, packed.quant_storage, packed.bnb_quantized = 64, torch.uint8, True
    layer._parameters["weight"] = packed
    layer.quant_state = state
    return layer


def empty_model(config: LlavaConfig, device: Any) -> Any:
    """`build_empty`, with parameters that are on the meta device although tensors are fake."""
    with _disable_current_modes():
        model = build_empty(config, "cpu")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return model


class EightBitAdamW(torch.optim.Optimizer):
    """The states of bitsandbytes' AdamW8bit: a byte a value and a float32 scale for 256; small ones in float32."""

    def __init__(self, params: Any, lr: float = 1e-3, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": options.get("weight_decay", 0.0)})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in (each for group in self.param_groups for each in group["params"]):
            if parameter.grad is None or self.state[parameter]:
                continue
            small = parameter.numel() < 4096
            for name in ("state1", "state2"):
                dtype = torch.float32 if small else torch.uint8
                self.state[parameter][name] = torch.zeros_like(parameter, dtype=dtype)
                if not small:
                    blocks = -(-parameter.numel() // 256)
                    self.state[parameter][f"{name}_scales"] = torch.zeros(blocks, device=parameter.device)
