"""A leaner step: what costs next to nothing to compute twice is not kept for the backward pass, and an adapter's output
is added to its layer's in one multiplication."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


class _Recompute(torch.autograd.Function):
    """Keeps a function's inputs and nothing else, and runs it again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        return None, *torch.autograd.grad(output, inputs, gradient)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up that keeps gate and up, and not silu(gate) beside them; autograd's own values, to the bit."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


def _lean_norm(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """RMSNorm that keeps its input (2 bytes a value in bfloat16) in place of the float32 copy it computes on (4)."""
    stock = type(self).forward
    if not hidden_states.requires_grad:
        return stock(self, hidden_states)
    return _Recompute.apply(lambda states: stock(self, states), hidden_states)


def _lean_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    """A Llama's MLP around `_SwiGLU`."""
    return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


def _lean_lora(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """LoRA that adds scaling * B A x by the multiplication itself; peft makes three more passes over the output for it,
    and a float32 copy of x where the layer is not 4-bit (peft/tuners/lora/layer.py and bnb.py, Linear.forward)."""
    adapter = self.active_adapters[0]
    autocast = torch.is_autocast_enabled(x.device.type)
    if args or kwargs or not _is_plain(self, adapter) or not (autocast or x.dtype == self.lora_A[adapter].weight.dtype):
        return type(self).forward(self, x, *args, **kwargs)
    result = self.base_layer(x)
    inner = self.lora_A[adapter](self.lora_dropout[adapter](x)).flatten(0, -2)
    weight, scaling = self.lora_B[adapter].weight.t(), self.scaling[adapter]
    return torch.addmm(result.flatten(0, -2), inner, weight, alpha=scaling).view(result.shape).to(result.dtype)


def _is_plain(layer: Any, adapter: str) -> bool:
    """Whether a layer has one adapter that is switched on, apart, and neither DoRA nor with a bias."""
    return (
        len(layer.active_adapters) == 1
        and adapter in layer.lora_A
        and adapter not in layer.lora_variant
        and layer.lora_B[adapter].bias is None
        and not layer.disable_adapters
        and not layer.merged
    )


def make_lean(language_model: nn.Module) -> int:
    """Let a Llama's frozen norms and its MLPs keep less, and its adapters pass over their outputs once.

    Norms and MLPs stay as they are to the bit, adapters to rounding.

    Args:
        language_model: The language model of a LLaVA; modules that are not Llama's or peft's stay stock.

    Returns:
        How many modules were changed.
    """
    changed = 0
    for module in language_model.modules():
        if isinstance(module, LlamaRMSNorm) and not module.weight.requires_grad:
            module.forward = MethodType(_lean_norm, module)
        elif isinstance(module, LlamaMLP) and module.config.hidden_act == "silu":
            module.forward = MethodType(_lean_mlp, module)
        elif isinstance(module, LoraLayer) and type(module).__name__ in ("Linear", "Linear4bit"):
            module.forward = MethodType(_lean_lora, module)
        else:
            continue
        changed += 1
    return changed
