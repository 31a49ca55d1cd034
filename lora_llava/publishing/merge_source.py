"""The source of a merge: a run and its base, with lazily read tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.model.adapter_file import checked_base
from lora_llava.model.families.llava_kinds import TILED, read_llava_config
from lora_llava.model.families.tower_families import saved_image_settings
from lora_llava.model.loading import resolve_dtype
from lora_llava.model.weights.names import canonical_name, stored_name
from lora_llava.model.weights.streaming import build_empty
from lora_llava.model.weights.tensor_files import LazyTensor, lazy_tensors
from lora_llava.publishing.adapter_tensors import Adapter, read_adapter
from lora_llava.runs.check_run import check_run
from lora_llava.runs.directory import read_record


@dataclass(frozen=True)
class MergeSource:
    """A run and its base.

    Attributes:
        run: The run directory.
        record: Its `run.json`.
        base: The base's folder.
        config: The base's config, with the canvases of the run.
        tensors: The base's tensors.
        adapter: The run's adapter.
        dtype: The dtype that the run computed in and quantised NF4 weights from.
    """

    run: Path
    record: dict[str, Any]
    base: Path
    config: LlavaConfig
    tensors: list[LazyTensor]
    adapter: Adapter
    dtype: torch.dtype


def read_source(run: Path) -> MergeSource:
    """Read a run, its adapter and its base.

    Raises:
        UserError: If one of them is missing, damaged or does not fit.
    """
    check_run(run)
    record = read_record(run)
    base = checked_base(record, run)
    adapter = read_adapter(run)
    config, tensors = read_llava_config(base), lazy_tensors(base)
    if config.model_type == TILED:  # a run may use fewer canvases than its base
        config.image_grid_pinpoints = (saved_image_settings(run) or {}).get(
            "image_grid_pinpoints", config.image_grid_pinpoints
        )
    check_complete(base, config, tensors)
    return MergeSource(run, record, base, config, tensors, adapter, resolve_dtype(record.get("dtype", "auto")))


def check_complete(base: Path, config: LlavaConfig, tensors: list[LazyTensor]) -> None:
    """Check that a folder has every weight of its config, before any long computation.

    Raises:
        UserError: If one is missing, or is stored twice.
    """
    stored = {canonical_name(tensor.name) for tensor in tensors}
    if len(stored) < len(tensors):
        raise UserError(f"{base} stores a tensor twice; remove the weight files that do not belong to it")
    for name, _ in build_empty(config).named_parameters():
        if stored_name(name, stored, config) not in stored:
            raise UserError(f"{base} lacks {name}, which its config.json requires; download or write it again")
