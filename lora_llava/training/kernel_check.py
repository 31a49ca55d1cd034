"""The kernels of a run: Liger's, if the first batch has the same loss and gradients with them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lora_llava.distributed.ranks import gather
from lora_llava.model.fast_path.liger import EXTRA, LigerModules, use_liger
from lora_llava.model.fast_path.trained_loss import count_labels, labelled_loss
from lora_llava.model.vision import dtype_of, llava_of
from lora_llava.training.start_check import TOLERANCES

_GRADIENT_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Difference of all gradients, relative to their norm, that rounding can cause in each dtype, with room: 16-bit
gradients of a deep model differ by some hundredths if an operator rounds at another place."""
FirstPass = tuple[float, dict[str, torch.Tensor]]
"""Mean loss of a batch, and the gradients by name."""


def choose_kernels(model: Any, samples: Sequence[dict[str, Any]], collator: Callable[..., Any]) -> str | None:
    """Use Liger's kernels from here on, if they are installed and a batch has the same loss and gradients with them.

    Args:
        model: The model to train, with lean layers and checkpointing, and without gradients.
        samples: The samples of the first batch.
        collator: The collator of training.

    Returns:
        A line to print, such as `kernels: Liger's; loss 1.8234, without them 1.8231, gradients within 1.2%`; None
        without a GPU.
    """
    if model.get_input_embeddings().weight.device.type != "cuda":
        return None
    return check_kernels(model, collator(samples))


def check_kernels(model: Any, batch: dict[str, Any]) -> str:
    """Use Liger's kernels if a batch has the same loss and gradients with them; see `choose_kernels`."""
    language_model = llava_of(model).model.language_model
    line = problem = None
    changed = LigerModules()
    try:
        changed = use_liger(language_model)
        if not changed.before:
            return "kernels: torch's; Liger has none for these layers"
        found = train_once(model, batch)
        changed.restore()
        line, problem = _compare(model, found, train_once(model, batch))
    except ImportError:
        return "kernels: torch's" + (f"; Liger's are faster: {EXTRA}" if sys.platform == "linux" else "")
    except Exception as error:  # Triton raises errors of many classes, of the compiler and of the driver
        changed.restore()
        problem = f"Liger's failed here ({_first_line(error)})"
    if reasons := [reason for reason in gather(problem) if reason]:
        return f"kernels: torch's; {reasons[0]}"
    use_liger(language_model)
    return f"kernels: Liger's; {line}"


def train_once(model: Any, batch: dict[str, Any]) -> FirstPass:
    """Run forward and backward as in training; return the mean loss and each gradient, in host memory."""
    weight, training = model.get_input_embeddings().weight, model.training
    dtype = dtype_of(model)
    inputs = {name: each.to(weight.device) if isinstance(each, torch.Tensor) else each for name, each in batch.items()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.train()
    try:
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            torch.manual_seed(0)  # the same dropout in both passes
            with torch.autocast(weight.device.type, dtype, enabled=dtype != torch.float32):
                loss = labelled_loss(model, inputs)[0]
            loss.backward()
        gradients = {name: each.grad.float().cpu() for name, each in trained.items() if each.grad is not None}
        return float(loss.detach()) / max(1, count_labels(batch)), gradients
    finally:
        model.train(training)
        for parameter in trained.values():
            parameter.grad = None


def gradients_apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference of all gradients, relative to the norm of the expected ones."""
    apart = sum(float((found[name] - each).square().sum()) for name, each in expected.items())
    return math.sqrt(apart / max(sum(float(each.square().sum()) for each in expected.values()), 1e-30))


def _compare(model: Any, found: FirstPass, stock: FirstPass) -> tuple[str, str | None]:
    """Return the differences between the passes with and without Liger's, and the problem if they are too large."""
    loss, stock_loss, share = found[0], stock[0], gradients_apart(found[1], stock[1])
    dtype = dtype_of(model)
    line = f"loss {loss:.4f}, without them {stock_loss:.4f}, gradients within {share:.1%}"
    equal = abs(loss - stock_loss) <= TOLERANCES[dtype] * abs(stock_loss) and share <= _GRADIENT_TOLERANCES[dtype]
    return line, None if equal else f"Liger's differ on the first batch ({line}); report this machine to us"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120] or type(error).__name__
