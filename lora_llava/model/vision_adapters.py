"""Adapters on the vision tower: which of its layers can train, and the pattern that names them to PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from transformers import LlavaConfig

_PATTERN = r".*vision_tower\..*layers\.({layers})\.(self_attn|mlp)\.({targets})"
_WRITTEN = re.compile(re.escape(_PATTERN).replace(r"\{layers\}", r"([\d|]+)").replace(r"\{targets\}", r"([\w|]+)"))
_PLACE = r".*vision_tower\..*"
"""Key of PEFT's `rank_pattern` and `alpha_pattern` for all of the tower's layers."""


@dataclass(frozen=True)
class VisionAdapters:
    """Adapters on a vision tower.

    Attributes:
        r: Rank.
        alpha: Scale.
        targets: Names of the tower's linear layers.
        layers: Number of layers that get them, from the first.
    """

    r: int
    alpha: float
    targets: Sequence[str]
    layers: int

    @property
    def pattern(self) -> str:
        """The pattern of the adapted layers, for PEFT's `target_modules`."""
        return _PATTERN.format(layers="|".join(map(str, range(self.layers))), targets="|".join(self.targets))

    def add_to(self, config: LoraConfig) -> LoraConfig:
        """Add these adapters to the PEFT config of a run; returns the config."""
        # The language model's pattern stays last: vLLM reads the names of the linear layers at the end.
        config.target_modules = f"{self.pattern}|{config.target_modules}"
        config.rank_pattern = {_PLACE: self.r}
        config.alpha_pattern = {_PLACE: self.alpha}
        return config


def vision_adapters(section: Mapping[str, Any], config: LlavaConfig) -> VisionAdapters:
    """Return the adapters of a recipe's `lora.vision`.

    Args:
        section: Its content: `r`, `alpha` and `targets`.
        config: Configuration of the LLaVA.
    """
    alpha = float(section["alpha"] or section["r"])
    return VisionAdapters(int(section["r"]), alpha, tuple(section["targets"]), used_layers(config))


def used_layers(config: LlavaConfig) -> int:
    """Return the number of the tower's layers, from the first, that the projector's features pass through.

    The others, for LLaVA the last one, would never get a gradient: their adapters would not train, and DDP would wait
    for their gradients forever. State 0 is the input of layer 0 and state i the output of layer i - 1.
    """
    states = config.vision_config.num_hidden_layers + 1
    chosen = config.vision_feature_layer
    return max(layer % states for layer in ([chosen] if isinstance(chosen, int) else chosen))


def planned_layers(pattern: str) -> int:
    """Return the number of the tower's linear layers that a PEFT config's `target_modules` adapts."""
    found = _WRITTEN.match(pattern)
    return len(found[1].split("|")) * len(found[2].split("|")) if found else 0
