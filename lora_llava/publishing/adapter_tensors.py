"""The tensors of a trained adapter: LoRA matrices by layer, matrices trained in full, and rows of new tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import get_pattern_key

from lora_llava.core.errors import UserError
from lora_llava.model.adapter_file import PEFT_PREFIX, read_lora_config
from lora_llava.model.weights.names import ADAPTER_FILE, PROJECTOR_PREFIX
from lora_llava.model.weights.tensor_files import LazyTensor, lazy_file

_EMBEDDINGS, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
_ROWS_OF = ".token_adapter.trainable_tokens_delta"
"""Between a matrix's name and the end of the name of its trained rows."""
_TOWER = "vision_tower"
_ROWS = 512
"""Rows per step; at 4096 columns five times as fast as complete matrices, which need fresh memory (2 cores)."""


@dataclass(frozen=True)
class LoraLayer:
    """The adapter of one linear layer.

    Attributes:
        down: Matrix A, shape (r, in).
        up: Matrix B, shape (out, r).
        scaling: The factor of B A.
        magnitude: DoRA's magnitudes, shape (out,); None for LoRA.
    """

    down: LazyTensor
    up: LazyTensor
    scaling: float
    magnitude: LazyTensor | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter with lazily read tensors.

    Attributes:
        folder: Its folder.
        config: PEFT's config.
        layers: The LoRA layers, by the name of the linear layer in the stock model.
        saved: What is saved in full, the projector among it, by parameter name of the stock model.
        rows: Trained rows of embeddings and head, by parameter name of the stock model.
        token_ids: Ids of the tokens of these rows, by the same name.
    """

    folder: Path
    config: LoraConfig
    layers: dict[str, LoraLayer]
    saved: dict[str, LazyTensor]
    rows: dict[str, LazyTensor]
    token_ids: dict[str, list[int]]

    def language_layers(self) -> dict[str, LoraLayer]:
        """Return the LoRA layers outside the vision tower."""
        return {name: layer for name, layer in self.layers.items() if not is_tower(name)}

    def stored_rows(self, name: str) -> str:
        """Return the key of a matrix in `rows`; PEFT stores the rows of a head that is tied to the embeddings once."""
        names = self.config.trainable_token_indices
        tied = name == _HEAD and name not in self.rows and isinstance(names, dict) and "lm_head" in names
        return _EMBEDDINGS if tied else name

    def tensor(self, name: str) -> torch.Tensor:
        """Read the adapter's tensor for a parameter of the PEFT model, in float32.

        Args:
            name: The name without PEFT's prefix, as `model.language_model.layers.0.mlp.up_proj.lora_A.default.weight`.
        """
        if name in self.saved:
            return self.saved[name].load().float()
        if ".modules_to_save." in name:
            return self.saved[name.replace("modules_to_save.default.", "")].load().float()
        if _ROWS_OF in name:
            return self.rows[self.stored_rows(name.split(_ROWS_OF)[0] + ".weight")].load().float()
        layer, _, kind = name.partition(".lora_")
        found = self.layers[layer]
        kinds = {"A": found.down, "B": found.up, "magnitude_vector": found.magnitude}
        tensor = kinds[kind.split(".")[0]]
        if tensor is None:
            raise KeyError(name)
        return tensor.load().float()


def is_tower(name: str) -> bool:
    """Check whether a parameter or layer of the stock model is the vision tower's."""
    return f"{_TOWER}." in name


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's config and locate its tensors.

    Args:
        folder: A run directory.

    Raises:
        UserError: If it is damaged, lacks the projector, or is of a kind that cannot be merged exactly.
    """
    config = read_lora_config(folder)
    tensors = {tensor.name.removeprefix(PEFT_PREFIX): tensor for tensor in lazy_file(folder / ADAPTER_FILE)}
    rows = {f"{name.split(_ROWS_OF)[0]}.weight": tensor for name, tensor in tensors.items() if _ROWS_OF in name}
    places = tuple(f".{module}." for module in config.modules_to_save or ())  # of modules, and of the newline
    saved = {
        name: tensor
        for name, tensor in tensors.items()
        if ".lora_" not in name and _ROWS_OF not in name and any(place in f".{name}." for place in places)
    }
    if config.modules_to_save and not any(name.startswith(PROJECTOR_PREFIX) for name in saved):
        raise UserError(f"{folder}/{ADAPTER_FILE} has no projector; it is not a complete LLaVA adapter")
    names = {name.split(".lora_")[0] for name in tensors if ".lora_" in name}
    unknown = {name for name in tensors if ".lora_" not in name and _ROWS_OF not in name} - set(saved)
    if unknown:
        raise UserError(f"{folder}/{ADAPTER_FILE}: {min(unknown)} is neither LoRA nor trained in full")
    if not names and config.target_modules != DUMMY_TARGET_MODULES:
        raise UserError(
            f"{folder}/{ADAPTER_FILE} has no LoRA matrices, although adapter_config.json names layers for them"
        )
    layers = {name: _layer(name, tensors, folder, config) for name in names}
    return Adapter(folder, config, layers, saved, rows, {name: _ids_of(name, config) for name in rows})


def _ids_of(name: str, config: LoraConfig) -> list[int]:
    """Return the token ids of a matrix's trained rows; PEFT names matrices by the end of their module's name."""
    indices = config.trainable_token_indices
    if isinstance(indices, dict):
        return next(ids for module, ids in indices.items() if f".{name}".endswith(f".{module}.weight"))
    return list(indices or ())


def _layer(name: str, tensors: dict[str, LazyTensor], folder: Path, config: LoraConfig) -> LoraLayer:
    r, alpha = (
        _by_pattern(config.rank_pattern, name, config.r),
        _by_pattern(config.alpha_pattern, name, config.lora_alpha),
    )
    keys = {"down": f"{name}.lora_A.weight", "up": f"{name}.lora_B.weight"}
    if config.use_dora:
        keys["magnitude"] = f"{name}.lora_magnitude_vector"
    for key in keys.values():
        if key not in tensors:
            raise UserError(f"{folder}/{ADAPTER_FILE} lacks {key}; it is damaged")
    # alpha / r, or alpha / sqrt(r) with rsLoRA (peft/tuners/lora/layer.py).
    scaling = alpha / r**0.5 if config.use_rslora else alpha / r
    layer = LoraLayer(scaling=scaling, **{field: tensors[key] for field, key in keys.items()})
    if layer.down.shape[0] != r or layer.up.shape[1] != r:
        raise UserError(
            f"{folder}/{ADAPTER_FILE}: {name} has rank {layer.down.shape[0]}, but adapter_config.json has {r:g}"
        )
    return layer


def _by_pattern(pattern: dict[str, Any] | None, name: str, default: Any) -> float:
    """Return PEFT's `rank_pattern` or `alpha_pattern` for a layer."""
    found = pattern or {}
    return float(found.get(get_pattern_key(found.keys(), name), default))


def merge_weight(
    weight: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Add an adapter to a weight, computed in float32.

    Args:
        weight: W, shape (out, in), any float dtype.
        down: A, shape (r, in), float32.
        up: B, shape (out, r), float32.
        scaling: Factor of B A.
        magnitude: DoRA's m, shape (out,), float32; None for LoRA.
        dtype: The dtype of the result.

    Returns:
        W + scaling B A; with DoRA multiplied by m / (norms of its rows) (arXiv 2402.09353, eq. 5).
    """
    merged = torch.empty_like(weight, dtype=dtype)
    for start in range(0, weight.shape[0], _ROWS):  # a few rows at a time fit into the CPU cache
        rows = slice(start, start + _ROWS)
        part = torch.addmm(weight[rows].float(), up[rows], down, alpha=scaling)
        if magnitude is not None:
            part *= (magnitude[rows] / torch.linalg.norm(part, dim=1)).unsqueeze(1)
        merged[rows] = part
    return merged
