"""Less kept for the backward pass: what costs next to nothing to compute twice is computed twice."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
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


def _lean_norm(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """RMSNorm that keeps its input (2 bytes a value in bfloat16) in place of the float32 copy it computes on (4)."""
    stock = type(self).forward
    if not hidden_states.requires_grad:
        return stock(self, hidden_states)
    return _Recompute.apply(lambda states: stock(self, states), hidden_states)


def _lean_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    """SwiGLU that keeps gate and up, and not the activated gate beside them."""
    gate, up = self.gate_proj(x), self.up_proj(x)
    if not gate.requires_grad:
        return self.down_proj(self.act_fn(gate) * up)
    return self.down_proj(_Recompute.apply(lambda gate, up: self.act_fn(gate) * up, gate, up))


def make_lean(language_model: nn.Module) -> int:
    """Let a Llama's frozen norms and its MLPs keep less; outputs and gradients stay as they are, to the bit.

    Args:
        language_model: The language model of a LLaVA; modules that are not Llama's stay stock.

    Returns:
        How many modules were changed.
    """
    changed = 0
    for module in language_model.modules():
        if isinstance(module, LlamaRMSNorm) and not module.weight.requires_grad:
            module.forward = MethodType(_lean_norm, module)
        elif isinstance(module, LlamaMLP):
            module.forward = MethodType(_lean_mlp, module)
        else:
            continue
        changed += 1
    return changed
