"""The optimizer's parameter groups: who trains at which learning rate, and with weight decay or not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_llava.model.adapters import NEWLINE, PROJECTOR


@dataclass(frozen=True)
class Rates:
    """The peak learning rates of a run.

    Attributes:
        adapters: Of everything without a rate of its own.
        projector: Of the projector.
        vision: Of adapters on the vision tower; None is `adapters`.
        loraplus_ratio: LoRA+: the rate of an adapter's matrix B, in multiples of that of A (arXiv 2402.12354);
            None is 1.
    """

    adapters: float
    projector: float
    vision: float | None = None
    loraplus_ratio: float | None = None

    def of(self, name: str) -> float:
        """Return the learning rate of a parameter by its name in the PEFT model."""
        if _is_projector(name):
            return self.projector
        rate = self.vision if self.vision is not None and _is_vision(name) else self.adapters
        return rate * self.loraplus_ratio if self.loraplus_ratio is not None and is_output_side(name) else rate


def _is_projector(name: str) -> bool:
    """Check whether a parameter is the projector's, or the newline, which trains with it."""
    return PROJECTOR in name or name.endswith(f".{NEWLINE}")


def _is_vision(name: str) -> bool:
    return ".vision_tower." in name


def is_output_side(name: str) -> bool:
    """Check whether LoRA+ multiplies a parameter's learning rate: B, and DoRA's magnitude, which scales the output.

    It is the rule of peft (peft/optimizers/loraplus.py, create_loraplus_optimizer).
    """
    return ".lora_B." in name or ".lora_magnitude_vector." in name


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], rates: Rates, weight_decay: float
) -> list[dict[str, Any]]:
    """Group the trained parameters by learning rate and weight decay.

    Args:
        parameters: A model's parameters by name; those that do not train are left out.
        rates: The learning rates.
        weight_decay: Weight decay of matrices; vectors have none.

    Returns:
        The groups, in the order of their first parameters.
    """
    groups: dict[tuple[bool, ...], tuple[float, list[nn.Parameter]]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            # By kind and not by rate: checkpoints have a state per group, and rates may change on resume.
            fast = rates.loraplus_ratio is not None and is_output_side(name)
            kind = (_is_projector(name), _is_vision(name), fast, parameter.ndim > 1)
            groups.setdefault(kind, (rates.of(name), []))[1].append(parameter)
    return [
        {"params": members, "lr": rate, "weight_decay": weight_decay if is_matrix else 0.0}
        for (*_, is_matrix), (rate, members) in groups.items()
    ]
