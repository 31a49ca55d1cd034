"""What is merged and published: a run, the base it stands on, and their tensors unread."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlavaConfig

from lora_llava.model.provenance import locate_base
from lora_llava.model.tensor_files import LazyTensor, lazy_tensors
from lora_llava.publishing.adapter import Adapter, read_adapter
from lora_llava.training.run_directory import read_record


@dataclass(frozen=True)
class Source:
    """What is merged.

    Attributes:
        run: The run directory.
        record: Its `run.json`.
        base: The base's folder.
        config: The base's config.
        tensors: The base's tensors.
        adapter: The run's adapter.
    """

    run: Path
    record: dict[str, Any]
    base: Path
    config: LlavaConfig
    tensors: list[LazyTensor]
    adapter: Adapter


def read_source(run: Path) -> Source:
    """Find all that a run is merged from.

    Raises:
        UserError: Where the run, its adapter or its base does not do.
    """
    record = read_record(run)
    adapter = read_adapter(run)
    base = locate_base(record["base"], run)
    return Source(run, record, base, LlavaConfig.from_pretrained(base), lazy_tensors(base), adapter)
