"""The shapes of a language model's layers and of a tower, from the stock modules on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from lora_llava.core.errors import UserError, nearest

ALL_LINEAR = "all-linear"
_STANDARD = frozenset({"self_attn", "mlp"})


@dataclass(frozen=True)
class DecoderShape:
    """The linear layers of a language model's decoder layers.

    Attributes:
        layers: Number of decoder layers.
        linears: Input and output sizes by name, such as `q_proj`, one pair for each such layer in the model.
        parents: Names of the modules in a decoder layer that hold them, such as `self_attn`; empty if some are deeper.
        weights: Number of weights of all these linear layers, without biases.
        parameters: Number of parameters of the language model, without the head.
        norm_values: Values per token that enter the norms of a decoder layer.
        layer_classes: Names of the decoder layers' classes, joined by commas.
    """

    layers: int
    linears: Mapping[str, tuple[tuple[int, int], ...]]
    parents: frozenset[str]
    weights: int
    parameters: int
    norm_values: int
    layer_classes: str

    def check_targets(self, targets: str | Iterable[str], model_type: str) -> tuple[str, ...]:
        """Return the names of the linear layers that `lora.targets` names.

        Raises:
            UserError: For a name that is not a linear layer of this model.
        """
        if targets == ALL_LINEAR:
            return tuple(self.linears)
        names = (targets,) if isinstance(targets, str) else tuple(targets)
        for name in names:
            if name not in self.linears:
                raise UserError(
                    f"lora.targets: {model_type} has no linear layer {name!r}{nearest(name, self.linears)}; it has "
                    f"{', '.join(self.linears)}"
                )
        return tuple(dict.fromkeys(names))

    def pattern(self, names: Iterable[str]) -> str:
        """Return the pattern of linear layers for peft, rooted at the language model."""
        if self.parents and self.parents <= _STANDARD:  # the ending that vLLM supports
            return rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(names)})$"
        return rf".*language_model\.layers\.\d+\.(?:.+\.)?({'|'.join(names)})$"


_SHAPES: dict[str, DecoderShape] = {}
_TOWERS: dict[str, int] = {}
"""What was built, by its configuration."""


def decoder_shape(text: PreTrainedConfig) -> DecoderShape:
    """Return the shapes of a language model, from its stock modules without weights."""
    key = text.to_json_string(use_diff=False)
    if key not in _SHAPES:
        _SHAPES[key] = _shape_of(_on_meta(text))
    return _SHAPES[key]


def tower_parameters(vision: PreTrainedConfig) -> int:
    """Return the number of parameters of a vision tower, its pooling head included."""
    key = vision.to_json_string(use_diff=False)
    if key not in _TOWERS:
        _TOWERS[key] = sum(parameter.numel() for parameter in _on_meta(vision).parameters())
    return _TOWERS[key]


def _on_meta(config: PreTrainedConfig) -> Any:
    config = copy.deepcopy(config)
    config.pad_token_id = None  # one beyond the embedding is an error of its own
    with torch.device("meta"):
        return AutoModel.from_config(config)


def _shape_of(model: Any) -> DecoderShape:
    linears: dict[str, list[tuple[int, int]]] = {}
    paths, seen = set(), set()
    for layer in model.layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and module not in seen:  # some families share modules between layers
                seen.add(module)
                parent, _, leaf = name.rpartition(".")
                linears.setdefault(leaf, []).append((module.in_features, module.out_features))
                paths.add(parent)
    return DecoderShape(
        len(model.layers),
        MappingProxyType({name: tuple(shapes) for name, shapes in linears.items()}),
        frozenset() if any("." in path or not path for path in paths) else frozenset(paths),
        sum(a * b for shapes in linears.values() for a, b in shapes),
        sum(parameter.numel() for parameter in model.parameters()),
        sum(_norm_width(name, module, model.config) for name, module in model.layers[0].named_modules()),
        ",".join(sorted({type(layer).__name__ for layer in model.layers})),
    )


def _norm_width(name: str, module: nn.Module, text: PreTrainedConfig) -> int:
    """Return the values per token that enter a norm; 0 for other modules."""
    weight = module._parameters.get("weight")
    if "norm" not in type(module).__name__.lower() or weight is None:
        return 0
    heads = {"q_norm": text.num_attention_heads, "k_norm": getattr(text, "num_key_value_heads", None)}
    per_head = heads.get(name.rpartition(".")[2]) if weight.numel() < text.hidden_size else None
    return weight.numel() * (per_head or 1)


def attention_widths(text: PreTrainedConfig) -> tuple[int, int]:
    """Return the values per token of the queries, and of the keys."""
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads * size, (getattr(text, "num_key_value_heads", None) or heads) * size
