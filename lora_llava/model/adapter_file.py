"""Check a saved adapter before use: its hash, its settings, and its tensors against its base."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.core.storage import file_hash
from lora_llava.model.adapters import adapter_on, adapter_tensors
from lora_llava.model.families.llava_kinds import read_llava_config
from lora_llava.model.provenance import locate_base
from lora_llava.model.weights.names import ADAPTER_FILE
from lora_llava.model.weights.streaming import build_empty
from lora_llava.model.weights.tensor_files import lazy_file

PEFT_PREFIX = "base_model.model."
CONFIG_FILE = "adapter_config.json"
_SUPPORTED = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}
"""Settings that are kept, or do not change the output of a finished adapter."""
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that change the base's weights; the adapter needs the changed base."""


def refuse_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Refuse an adapter with settings that are not supported.

    Every other setting must be at its default, so that new settings of a later PEFT are refused too.

    Args:
        settings: The content of an `adapter_config.json`.
        file: The file, for messages.

    Raises:
        UserError: Naming the first such setting.
    """
    for name, value in settings.items():
        if name not in _SUPPORTED and value not in (None, False, 0, "", "none", {}, []):
            raise UserError(
                f"{file}: {name} is {json.dumps(value)}, which lora_llava does not support; train without it"
            )
    start = str(settings.get("init_lora_weights") or "").lower()
    if start.startswith(_REWRITES_BASE):
        raise UserError(
            f"{file}: init_lora_weights is {start}, which changes the base's own weights; convert it to plain LoRA "
            "with peft's save_pretrained(path_initial_model_for_weight_conversion=...) first"
        )


def read_lora_config(folder: Path) -> LoraConfig:
    """Read a folder's `adapter_config.json`.

    Raises:
        UserError: If it is missing, not PEFT's, not LoRA, or has settings that are not supported.
    """
    file = folder / CONFIG_FILE
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.get("peft_type", "LORA") == "LORA":
            refuse_settings(settings, file)
        config = PeftConfig.from_pretrained(str(folder))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; restore it") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not PEFT's: {(str(error).splitlines() or ['damaged'])[0]}") from None
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder}: a {config.peft_type} adapter; only LoRA's can be merged")
    if not isinstance(config.r, int) or config.r < 1:
        raise UserError(f"{file}: r is {config.r}; it should be a whole number above 0")
    _check_patterns(config, file)
    return config


def _check_patterns(config: LoraConfig, file: Path) -> None:
    """Check settings of single layers and tokens: ranks, scales, and the ids of tokens with trained rows."""
    for name, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        for layer, value in dict(getattr(config, name) or {}).items():
            valid = isinstance(value, int if whole else int | float) and not isinstance(value, bool) and value > 0
            if not valid or not _is_pattern(layer):
                kind = "a whole number" if whole else "a number"
                raise UserError(f"{file}: {name} of {layer} is {value!r}; it should be {kind} above 0; restore it")
    indices = config.trainable_token_indices or []
    for ids in indices.values() if isinstance(indices, dict) else [indices]:
        if not isinstance(ids, list) or not all(type(index) is int and index >= 0 for index in ids):
            raise UserError(
                f"{file}: trainable_token_indices has {ids!r}; it should be a list of token ids; restore it"
            )


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def check_saved(folder: Path, record: Mapping[str, Any]) -> None:
    """Check an adapter's hash and settings, without its base.

    Args:
        folder: The run directory.
        record: Its `run.json`; runs of older versions recorded no hash.

    Raises:
        UserError: If the file has changed, or a setting is not supported.
    """
    read_lora_config(folder)
    file, recorded = folder / ADAPTER_FILE, record.get("adapter_sha256")
    if recorded is None:
        return
    found = file_hash(file)
    if found != recorded:
        raise UserError(
            f"{file} has changed since it was saved (its SHA-256 is {found[:12]}, run.json has {str(recorded)[:12]}); "
            "restore it, or train again"
        )


def check_fits(folder: Path, base: LlavaConfig, base_name: str) -> None:
    """Check that an adapter's file holds exactly the tensors that PEFT expects for its settings and base.

    Args:
        folder: The run directory.
        base: The base's configuration.
        base_name: The base's name or folder, for messages.

    Raises:
        UserError: Naming the first tensor that is missing, unexpected, of another shape or not finite, and the number
            of such tensors.
    """
    file = folder / ADAPTER_FILE
    expected = _expected_shapes(folder, base, base_name)
    found = {tensor.name: tensor for tensor in lazy_file(file)}
    faults = [f"{_short(name)} is missing" for name in sorted(expected.keys() - found.keys())]
    faults += [f"{_short(name)} is not expected" for name in sorted(found.keys() - expected.keys())]
    common = sorted(expected.keys() & found.keys())
    for name in common:
        if found[name].shape != expected[name]:
            shape, wanted = _times(found[name].shape), _times(expected[name])
            faults.append(f"{_short(name)} has shape {shape}, not {wanted}")
    faults += [
        f"{_short(name)} has values that are not finite"
        for name in common
        if found[name].shape == expected[name] and not torch.isfinite(found[name].load()).all()
    ]
    if faults:
        raise UserError(
            f"{file} does not fit its {CONFIG_FILE} and the base {base_name}: {faults[0]} (tensors at fault: "
            f"{len(faults)} of {len(expected)}); restore the file, or train again"
        )


def _expected_shapes(folder: Path, base: LlavaConfig, base_name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes by name that PEFT would save for this adapter on this base."""
    config = read_lora_config(folder)
    rows, indices = base.text_config.vocab_size, config.trainable_token_indices or []
    highest = max(
        (max(ids, default=0) for ids in (indices.values() if isinstance(indices, dict) else [indices])), default=0
    )
    if highest >= rows:
        raise UserError(
            f"{folder}/{CONFIG_FILE} does not fit the base {base_name}: it has trained the row of token {highest}, and "
            f"the base has {rows} rows; restore it"
        )
    try:
        model = adapter_on(build_empty(base), config)
    except (ValueError, AttributeError, TypeError, IndexError) as error:
        raise UserError(
            f"{folder}/{CONFIG_FILE} does not fit the base {base_name}: {str(error).splitlines()[0]}; restore it"
        ) from None
    return {name: tuple(tensor.shape) for name, tensor in adapter_tensors(model).items()}


def _short(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def checked_base(record: Mapping[str, Any], adapter: Path) -> Path:
    """Check an adapter and find its base; every use of an adapter begins with this.

    Args:
        record: The adapter's `run.json`.
        adapter: The adapter's folder.

    Returns:
        The base's folder, from `locate_base`.

    Raises:
        UserError: If the adapter is damaged or does not fit its base, or the base is missing or has changed.
    """
    check_saved(adapter, record)
    base = locate_base(record["base"], adapter)
    check_fits(adapter, read_llava_config(base), str(base))
    return base
