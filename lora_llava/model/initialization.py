"""How adapters start, besides PEFT's default of a zero B: orthogonal, from the data (EVA), or as a correction of NF4.

A start is over when training begins: the saved config has PEFT's default, so that loading an adapter starts nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import nn

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.model.adapters import VISION, check_adapters
from lora_llava.model.loading import autocast, is_4bit
from lora_llava.model.vision import dtype_of
from lora_llava.model.weights.names import canonical_name
from lora_llava.model.weights.tensor_files import lazy_tensors

NEEDS_NF4 = "loftq"
"""The start whose adapter corrects the NF4 base, and fits no other."""
EVA_BATCHES = 64
"""Most batches that EVA reads; it stops when the directions no longer change."""
_EVA_PASSES = 500
"""Passes after which directions that still change are given up."""
EVA_RHO = 2.0
"""A layer's largest rank under EVA, in multiples of r (PEFT's default)."""
EVA_POSITIONS = 4
"""Positions per direction that EVA takes of a batch; PEFT hashes them all as Python numbers."""


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Return the adapted layers by name in the stock model."""
    base = model.get_base_model()
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def start_orthogonal(model: PeftModel) -> None:
    """Give A and B orthogonal directions whose product is zero, by PEFT's rule.

    PEFT computes in the dtype of the layer's weight, which would be bytes in a 4-bit layer; here it is float32.
    """
    for layer in lora_layers(model).values():
        device = layer.lora_A[model.active_adapter].weight.device
        view: Any = SimpleNamespace(
            r=layer.r,
            in_features=layer.in_features,
            out_features=layer.out_features,
            lora_A=layer.lora_A,
            lora_B=layer.lora_B,
            get_base_layer=lambda: SimpleNamespace(weight=torch.empty(0, dtype=torch.float32)),
        )
        LoraLayer.orthogonal_init(view, model.active_adapter)
        layer.lora_A.to(device)
        layer.lora_B.to(device)


@torch.no_grad()
def start_loftq(model: PeftModel, base: Path) -> None:
    """Let the adapters of 4-bit layers correct the error of their quantization (LoftQ, arXiv 2310.08659).

    The error is decomposed by PEFT, as in its `replace_lora_weights_loftq`, which runs on GPUs only, expects the file
    to have the model's names, and ignores the adapter's scale.

    Args:
        model: The PEFT model, with a 4-bit base.
        base: The folder of the base's weights.
    """
    from bitsandbytes.functional import dequantize_4bit  # cannot be imported on every machine

    layers = {name: layer for name, layer in lora_layers(model).items() if is_4bit(layer.get_base_layer())}
    stored = {canonical_name(tensor.name): tensor for tensor in lazy_tensors(base)}
    adapter = model.active_adapter
    for name in progress_bar(layers, desc="correcting NF4", leave=False):
        layer = layers[name]
        packed: Any = layer.get_base_layer().weight
        exact = stored[f"{name}.weight"].load().to(packed.device, torch.float32)
        found = _low_rank_decomposition(
            exact - dequantize_4bit(packed.data, packed.quant_state).float(), reduced_rank=layer.r[adapter]
        )
        share = layer.scaling[adapter] ** 0.5  # the layer adds scaling * B A
        layer.lora_A[adapter].weight.copy_(found["R"] / share)
        layer.lora_B[adapter].weight.copy_(found["L"] / share)


class _Batch(dict[str, Any]):
    """A batch that PEFT can move: its values need not all be tensors."""

    def to(self, device: torch.device) -> _Batch:
        moved = ((name, value.to(device) if isinstance(value, torch.Tensor) else value) for name, value in self.items())
        return _Batch(moved)


def start_eva(model: PeftModel, batches: Iterable[dict[str, Any]]) -> None:
    """Start A from the main directions of each layer's inputs, and distribute the ranks by what they explain (EVA).

    Every process must read the same batches, as each computes the same ranks.

    Args:
        model: The PEFT model.
        batches: Batches of the training data.

    Raises:
        UserError: If the directions do not settle, or the data is too little.
    """
    config = model.peft_config[model.active_adapter]
    layers = {name: layer for name, layer in lora_layers(model).items() if VISION not in name}
    rho = min(EVA_RHO, min(layer.in_features for layer in layers.values()) / config.r)
    settings, most = EvaConfig(rho=rho, use_label_mask=False), round(rho * config.r)
    usable = [_Batch(batch) for batch in batches if _positions(batch, most).shape[0] >= most]
    if not usable:
        raise UserError(f"lora.init: eva needs rows of at least {most} tokens, for lora.r {config.r}; use default")
    found = get_eva_state_dict(
        _Plain(model.base_model).train(model.training),
        usable,
        replace(config, eva_config=settings, init_lora_weights="eva", target_modules=[_inner(name) for name in layers]),
        forward_fn=_Forward(dtype_of(model)),
        prepare_model_inputs_fn=lambda batch, _: _positions(batch, most),
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )
    with warnings.catch_warnings():  # that the vision tower's adapters start as by default
        warnings.filterwarnings("ignore", "the following layers were initialized with init_lora_weights=True")
        _distribute(model, config, {name.removesuffix(".base_layer"): ranks for name, ranks in found.items()})


def _inner(name: str) -> str:
    """Return the name of an adapted layer's own weights in `_Plain`."""
    return f"base_model.model.{name}.base_layer"


class _Plain(nn.Module):
    """A model that PEFT does not know to have adapters.

    Of one with adapters it would switch off the trained projector too, and would take the rows of new tokens for an
    adapted layer. The adapters are zero at this point.
    """

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model = base_model

    def forward(self, **inputs: Any) -> Any:
        return self.base_model(**inputs)


class _Forward:
    """The forward pass over a batch, as in training, counted."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.passes = dtype, 0

    def __call__(self, model: nn.Module, batch: _Batch) -> Any:
        self.passes += 1
        if self.passes > _EVA_PASSES:
            raise UserError(f"lora.init: eva found no stable directions in {_EVA_PASSES} batches; use default")
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with autocast(batch["input_ids"].device, self.dtype):
            return model(**inputs, use_cache=False, logits_to_keep=1)


def _positions(batch: dict[str, Any], directions: int) -> torch.Tensor:
    """Return some positions of a batch, evenly spaced and without padding: rows and columns, shape (positions, 2)."""
    mask = batch.get("attention_mask")
    found = (torch.ones_like(batch["input_ids"]) if mask is None else mask).nonzero()
    return found[:: max(1, found.shape[0] // (EVA_POSITIONS * directions))]


def _distribute(model: PeftModel, config: LoraConfig, directions: dict[str, torch.Tensor]) -> None:
    """Let PEFT set the ranks, and keep our pattern in its config, with the layers that got no rank as exceptions."""
    pattern, layers = config.target_modules, list(lora_layers(model))
    config.eva_config, config.init_lora_weights = EvaConfig(), "eva"
    initialize_lora_eva_weights(model, eva_state_dict=directions)
    kept = lora_layers(model)
    without = [name for name in layers if name not in kept]
    config.target_modules, config.exclude_modules = pattern, without or None
    config.eva_config, config.init_lora_weights = None, True
    for layer in kept.values():
        layer.lora_A.float()
        layer.lora_B.float()
    check_adapters(model, expected=len(layers) - len(without))
