"""Training steps with less memory and time, by three changes to a language model.

Norms and MLPs recompute cheap values in the backward pass in place of keeping them, and an adapter's output is added to
that of its layer in one matrix multiplication.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from lora_llava.model.families.language_families import FAMILIES


class _Recompute(torch.autograd.Function):
    """A function that keeps only its inputs, and runs again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        # Build the graph of this one function, and differentiate it.
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        return None, *torch.autograd.grad(output, inputs, gradient)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps gate and up but not silu(gate); bit-equal to autograd."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        # d/dgate = gradient * up * silu'(gate), and d/dup = gradient * silu(gate), which is computed again.
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


def _lean_norm(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """RMSNorm that keeps its input (2 bytes per value in bfloat16) in place of its float32 copy (4 bytes)."""
    stock = type(self).forward
    if not hidden_states.requires_grad:
        return stock(self, hidden_states)
    return _Recompute.apply(lambda states: stock(self, states), hidden_states)


def _lean_mlp(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """An MLP that keeps gate and up and nothing else."""
    return self.down_proj(_gated(self, *gate_and_up(self, hidden_states)))


def gate_and_up(mlp: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute gate and up of an MLP in `MLPS`, from two matrices or, such as Phi-3's, from one."""
    if MLPS[type(mlp).__name__]:
        gate, up = mlp.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return gate, up
    return mlp.gate_proj(hidden_states), mlp.up_proj(hidden_states)


def activation_of(mlp: Any) -> Any:
    """Return the activation of an MLP in `MLPS`."""
    return mlp.activation_fn if MLPS[type(mlp).__name__] else mlp.act_fn


def is_silu(mlp: Any) -> bool:
    """Check whether an MLP in `MLPS` computes silu(gate) * up."""
    return isinstance(activation_of(mlp), _SILU)


def _gated(mlp: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return activation(gate) * up, with gate and up kept and nothing else."""
    if is_silu(mlp):
        return _SwiGLU.apply(gate, up)
    activation = activation_of(mlp)
    if not (gate.requires_grad or up.requires_grad):
        return activation(gate) * up
    return _Recompute.apply(lambda g, u: activation(g) * u, gate, up)


def _lean_lora(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """LoRA that adds scaling * B A x to the layer's output in one matrix multiplication.

    peft makes three more passes over the output, and a float32 copy of x if the layer is not 4-bit
    (peft/tuners/lora/layer.py and bnb.py, Linear.forward).
    """
    adapter = self.active_adapters[0]
    autocast = torch.is_autocast_enabled(x.device.type)
    # Leave everything unusual to peft.
    if args or kwargs or not _is_plain(self, adapter) or not (autocast or x.dtype == self.lora_A[adapter].weight.dtype):
        return type(self).forward(self, x, *args, **kwargs)
    result = self.base_layer(x)
    # addmm takes matrices: (rows, tokens, features) is flattened to (rows * tokens, features) and back.
    inner = self.lora_A[adapter](self.lora_dropout[adapter](x)).flatten(0, -2)
    weight, scaling = self.lora_B[adapter].weight.t(), self.scaling[adapter]
    return torch.addmm(result.flatten(0, -2), inner, weight, alpha=scaling).view(result.shape).to(result.dtype)


def _is_plain(layer: Any, adapter: str) -> bool:
    """Check whether a layer has exactly one adapter, enabled, not merged, without DoRA and without a bias."""
    return (
        len(layer.active_adapters) == 1
        and adapter in layer.lora_A
        and adapter not in layer.lora_variant
        and layer.lora_B[adapter].bias is None
        and not layer.disable_adapters
        and not layer.merged
    )


_NORMS = frozenset(family.norm for family in FAMILIES.values())
MLPS = {family.mlp: family.fused_mlp for family in FAMILIES.values()}
"""Whether gate and up are one matrix, by class."""
_SILU = (nn.SiLU, type(ACT2FN["silu"]))


def make_lean(language_model: nn.Module) -> int:
    """Replace the forward methods of a language model's frozen norms, MLPs and adapters with lean ones.

    The outputs of norms and MLPs are bit-equal to the stock ones; those of adapters are equal up to rounding.

    Args:
        language_model: The language model of a LLaVA; modules that are not in the table of families or peft's stay
            stock.

    Returns:
        The number of modules that were changed.
    """
    changed = 0
    for module in language_model.modules():
        name = type(module).__name__
        if name in _NORMS and not module.weight.requires_grad:  # type: ignore[union-attr]
            module.forward = MethodType(_lean_norm, module)
        elif name in MLPS:
            module.forward = MethodType(_lean_mlp, module)
        elif isinstance(module, LoraLayer) and name in ("Linear", "Linear4bit"):
            module.forward = MethodType(_lean_lora, module)
        else:
            continue
        changed += 1
    return changed
