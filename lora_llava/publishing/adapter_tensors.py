"""The tensors of a trained adapter: LoRA matrices by layer, and the projector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES

from lora_llava.core.errors import UserError
from lora_llava.model.adapter_file import PEFT_PREFIX, read_lora_config
from lora_llava.model.weights.names import ADAPTER_FILE, PROJECTOR_PREFIX
from lora_llava.model.weights.tensor_files import LazyTensor, lazy_file

_ROWS = 512
"""Rows per step; at 4096 columns five times as fast as complete matrices, which need fresh memory (2 cores)."""


@dataclass(frozen=True)
class LoraLayer:
    """The adapter of one linear layer.

    Attributes:
        down: Matrix A, shape (r, in).
        up: Matrix B, shape (out, r).
        magnitude: DoRA's magnitudes, shape (out,); None for LoRA.
    """

    down: LazyTensor
    up: LazyTensor
    magnitude: LazyTensor | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter with lazily read tensors.

    Attributes:
        folder: Its folder.
        config: PEFT's config.
        layers: The LoRA layers, by the name of the linear layer in the stock model.
        projector: The trained projector, by parameter name of the stock model.
    """

    folder: Path
    config: LoraConfig
    layers: dict[str, LoraLayer]
    projector: dict[str, LazyTensor]

    @property
    def scaling(self) -> float:
        """The factor of B A: alpha / r, or alpha / sqrt(r) with rsLoRA (peft/tuners/lora/layer.py)."""
        alpha, r = float(self.config.lora_alpha), float(self.config.r)
        return alpha / r**0.5 if self.config.use_rslora else alpha / r

    def tensor(self, name: str) -> torch.Tensor:
        """Read the adapter's tensor for a parameter of the PEFT model, in float32.

        Args:
            name: The name without PEFT's prefix, as `model.language_model.layers.0.mlp.up_proj.lora_A.default.weight`.
        """
        if ".modules_to_save." in name:
            return self.projector[name.replace("modules_to_save.default.", "")].load().float()
        layer, _, kind = name.partition(".lora_")
        found = self.layers[layer]
        kinds = {"A": found.down, "B": found.up, "magnitude_vector": found.magnitude}
        tensor = kinds[kind.split(".")[0]]
        if tensor is None:
            raise KeyError(name)
        return tensor.load().float()


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's config and locate its tensors.

    Args:
        folder: A run directory.

    Raises:
        UserError: If it is damaged, lacks the projector, or is of a kind that cannot be merged exactly.
    """
    config = read_lora_config(folder)
    tensors = {tensor.name.removeprefix(PEFT_PREFIX): tensor for tensor in lazy_file(folder / ADAPTER_FILE)}
    projector = {name: tensor for name, tensor in tensors.items() if name.startswith(PROJECTOR_PREFIX)}
    if config.modules_to_save and not projector:
        raise UserError(f"{folder}/{ADAPTER_FILE} has no projector; it is not a complete LLaVA adapter")
    names = {name.split(".lora_")[0] for name in tensors if ".lora_" in name}
    unknown = set(tensors) - set(projector) - {name for name in tensors if ".lora_" in name}
    if unknown:
        raise UserError(f"{folder}/{ADAPTER_FILE}: {min(unknown)} is neither LoRA nor the projector")
    if not names and config.target_modules != DUMMY_TARGET_MODULES:
        raise UserError(
            f"{folder}/{ADAPTER_FILE} has no LoRA matrices, although adapter_config.json names layers for them"
        )
    return Adapter(folder, config, {name: _layer(name, tensors, folder, config) for name in names}, projector)


def _layer(name: str, tensors: dict[str, LazyTensor], folder: Path, config: LoraConfig) -> LoraLayer:
    r = int(config.r)
    keys = {"down": f"{name}.lora_A.weight", "up": f"{name}.lora_B.weight"}
    if config.use_dora:
        keys["magnitude"] = f"{name}.lora_magnitude_vector"
    for key in keys.values():
        if key not in tensors:
            raise UserError(f"{folder}/{ADAPTER_FILE} lacks {key}; it is damaged")
    layer = LoraLayer(**{field: tensors[key] for field, key in keys.items()})
    if layer.down.shape[0] != r or layer.up.shape[1] != r:
        raise UserError(
            f"{folder}/{ADAPTER_FILE}: {name} has rank {layer.down.shape[0]}, but adapter_config.json has {r}"
        )
    return layer


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
