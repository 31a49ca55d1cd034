"""Triton kernels of `liger-kernel` for norms, SwiGLU and rotary positions, in place of the lean path's operators.

Called in forward passes with a graph only; evaluation and generation keep the stock operators.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version

from lora_llava.model.fast_path.lean import MLPS, gate_and_up, is_silu

EXTRA = "pip install 'lora_llava[liger]'"
Rotation = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class NormFormula:
    """How a class of norms computes: x / rms(x) * (offset + weight).

    Attributes:
        offset: Added to the weight.
        casting: Liger's name of the dtypes: `llama` rounds before it multiplies by the weight, `gemma` after.
        epsilon: The attribute with the number added to the mean square.
    """

    offset: float = 0.0
    casting: str = "llama"
    epsilon: str = "variance_epsilon"


NORMS = {
    "LlamaRMSNorm": NormFormula(),
    "MistralRMSNorm": NormFormula(),
    "Qwen2RMSNorm": NormFormula(),
    "Qwen3RMSNorm": NormFormula(),
    "Phi3RMSNorm": NormFormula(),
    "Gemma3RMSNorm": NormFormula(1.0, "gemma", "eps"),
}
"""By class, as read in transformers 5.24; a norm that is not here keeps its own operators."""
ATTENTIONS = frozenset(f"{name}Attention" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma3"))
"""Classes that rotate the halves of a head, or of its first part, as `LigerRopeFunction` does."""
_ROTATION = "apply_rotary_pos_emb"
"""The function of transformers that every attention in `ATTENTIONS` calls, a global name of its module."""


@dataclass(frozen=True)
class LigerFunctions:
    """The functions of liger-kernel that are used.

    Attributes:
        norm: `LigerRMSNormFunction.apply`.
        swiglu: silu(gate) * up; its backward pass writes the gradients into gate and up.
        rope: `LigerRopeFunction.apply`; it rotates queries and keys in place.
    """

    norm: Callable[..., torch.Tensor]
    swiglu: Callable[..., torch.Tensor]
    rope: Rotation


@functools.cache
def load_liger() -> LigerFunctions:
    """Import liger-kernel's functions.

    Raises:
        ImportError: If liger-kernel or Triton is not installed.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward

    # Both functions write into tensors that they were given, which autograd cannot see in a kernel. It learns of it
    # here, so that a backward pass that needs the old values fails.
    class SwiGLU(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            gate, up, output = swiglu_forward(gate.contiguous(), up.contiguous())
            ctx.save_for_backward(gate, up)
            return output

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
            gate, up = ctx.saved_tensors  # recomputed layers give them once
            increment_version((gate, up))
            return swiglu_backward(gate, up, gradient.contiguous())

    class Rope(LigerRopeFunction):
        @staticmethod
        def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
            increment_version((query, key))
            return LigerRopeFunction.forward(ctx, query, key, cos, sin)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            return LigerRopeFunction.backward(ctx, *gradients)[:4]

    return LigerFunctions(LigerRMSNormFunction.apply, SwiGLU.apply, Rope.apply)


@dataclass
class LigerModules:
    """The modules of a language model that call Liger's kernels.

    Attributes:
        before: Each module with the forward method it had.
    """

    before: list[tuple[nn.Module, Any]] = field(default_factory=list)

    def replace(self, module: nn.Module, forward: Any) -> None:
        """Give a module another forward method."""
        self.before.append((module, module.forward))
        module.forward = forward

    def restore(self) -> None:
        """Give every module back the forward method it had."""
        while self.before:
            module, forward = self.before.pop()
            module.forward = forward


def use_liger(language_model: nn.Module) -> LigerModules:
    """Let a language model call Liger's kernels where its layers compute what the kernels do.

    Args:
        language_model: A language model on a GPU, after `make_lean`.

    Returns:
        The changed modules; none if no layer is of a class that the kernels are for.

    Raises:
        ImportError: If liger-kernel or Triton is not installed.
    """
    liger, changed = load_liger(), LigerModules()
    for module in language_model.modules():
        name = type(module).__name__
        if name in NORMS and not module.weight.requires_grad:  # type: ignore[union-attr]
            changed.replace(module, functools.partial(_norm, liger, NORMS[name], module, module.forward))
        elif name in MLPS and is_silu(module):
            changed.replace(module, functools.partial(_mlp, liger, module, module.forward))
        elif name in ATTENTIONS and (forward := _rotating(liger, module)) is not None:
            changed.replace(module, forward)
    return changed


def _norm(liger: LigerFunctions, formula: NormFormula, norm: Any, before: Any, states: torch.Tensor) -> torch.Tensor:
    """Run a frozen norm; its weight gets no gradient."""
    if not states.requires_grad or states.dtype != norm.weight.dtype:
        return before(states)
    # Not in place: a norm before a residual sum shares its output's gradient with the sum.
    epsilon = getattr(norm, formula.epsilon)
    return liger.norm(states, norm.weight, epsilon, formula.offset, formula.casting, False)


def _mlp(liger: LigerFunctions, mlp: Any, before: Any, states: torch.Tensor) -> torch.Tensor:
    """Run an MLP with SiLU."""
    if not torch.is_grad_enabled():
        return before(states)
    return mlp.down_proj(liger.swiglu(*gate_and_up(mlp, states)))


def _rotating(liger: LigerFunctions, attention: nn.Module) -> Any:
    """Return an attention's forward method with Liger's rotation; None if it calls another function of transformers.

    The function is a global name of its module: this module's method alone gets other globals, and the rest of the
    process keeps the stock function.
    """
    function: Any = inspect.unwrap(type(attention).forward)
    if _ROTATION not in function.__code__.co_names or _ROTATION not in function.__globals__:
        return None
    rotate = functools.partial(_rotate, liger, function.__globals__[_ROTATION])
    names = {**function.__globals__, _ROTATION: rotate}
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return MethodType(copied, attention)


def _rotate(
    liger: LigerFunctions,
    stock: Rotation,
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys of shape (rows, heads, tokens, head size) in place."""
    graph = query.requires_grad or key.requires_grad
    if not graph or unsqueeze_dim != 1 or not query.dtype == key.dtype == cos.dtype:
        return stock(query, key, cos, sin, unsqueeze_dim)
    return liger.rope(query, key, cos, sin)
