"""`lora-llava merge`: merge an adapter into its base as one stock folder, and verify the result."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from lora_llava.core.errors import UserError
from lora_llava.core.storage import file_hash
from lora_llava.model.adapter_file import PEFT_PREFIX
from lora_llava.model.loading import check_bitsandbytes, resolve_dtype
from lora_llava.model.provenance import component_hashes
from lora_llava.model.start import RUN_FILE
from lora_llava.model.weights.names import ADAPTER_FILE
from lora_llava.model.weights.tensor_files import LazyTensor, checkpoint_bytes, write_checkpoint, write_file
from lora_llava.publishing.adapter_tensors import Adapter
from lora_llava.publishing.merge_check import MergedModel, prepare_questions, print_report, prove
from lora_llava.publishing.merge_source import MergeSource, read_source
from lora_llava.publishing.merged_weights import BaseKind, merged_tensors
from lora_llava.publishing.new_folder import check_disk, check_new, new_folder
from lora_llava.publishing.proof_prompts import PER_KIND
from lora_llava.publishing.serving_folder import write_serving
from lora_llava.recipe.io import RECIPE_FILE
from lora_llava.runs.directory import METRICS_FILE, versions, write_json
from lora_llava.splits.seen_rows import SEEN_FILE

REPORT_FILE = "merge_report.json"
Dtype = Literal["bfloat16", "float32"]
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
BASE_FOLDER, ADAPTER_FOLDER, BASE_FILE = "base", "adapter", "base.json"
IMPORTED = "imported"
"""Name of the base of a converted checkpoint, in its records."""


def merge(
    run: Path,
    output: Path,
    *,
    base: BaseKind = "bf16",
    dtype: Dtype = "bfloat16",
    projector_only: bool = False,
    prompts: int = PER_KIND,
    console: Console,
) -> dict[str, Any]:
    """Merge a run into its base, verify the result, and only then rename it to `output`.

    Args:
        run: A run directory.
        output: The new folder, which must not exist.
        base: `bf16` adds to the base's weights as stored, `nf4` to their values after NF4 quantisation.
        dtype: The dtype of the stored weights.
        projector_only: Put the projector, and any LoRA of the vision tower, into `output/base`, and keep the language
            model's LoRA as an adapter in `output/adapter`.
        prompts: Number of sample prompts of each kind, with and without an image.
        console: Prints progress and report.

    Returns:
        The content of `merge_report.json`.

    Raises:
        ProofError: If the merged model differs from base + adapter by more than the tolerance; nothing is kept.
        UserError: For an unsuitable run or base, or too little disk space.
    """
    source = read_source(run)
    check_new(output)
    if base != "nf4" and source.record.get("needs_base") == "nf4":
        raise UserError(
            f"--base {base}: {run} started with lora.init loftq and corrects NF4's rounding; use --base nf4"
        )
    if base == "nf4":
        check_bitsandbytes()
    if projector_only and not source.adapter.layers:
        raise UserError(f"--projector-only: {run} is a Stage 1 run without LoRA; leave the flag out")
    start = time.monotonic()
    stored = resolve_dtype(dtype)
    tensors = merged_tensors(
        source.tensors, source.adapter, kind=base, with_lora=not projector_only, dtype=stored, nf4_from=source.dtype
    )
    questions = prepare_questions(source, prompts)
    check_disk(output, checkpoint_bytes(tensors, stored))
    with new_folder(output) as temporary:
        folder = temporary / BASE_FOLDER if projector_only else temporary
        seconds = _write_model(folder, source, tensors, stored)
        if projector_only:
            write_adapter(temporary / ADAPTER_FOLDER, source, base_name=str(output.resolve() / BASE_FOLDER))
        merged = MergedModel(folder, temporary / ADAPTER_FOLDER if projector_only else None, base, stored)
        report = prove(source, merged, questions, console)
        size = sum(file.stat().st_size for file in temporary.rglob("*.safetensors"))
        report |= {
            "bytes": size,
            "write_seconds": round(seconds, 3),
            "seconds": round(time.monotonic() - start, 3),
            "versions": versions(),
        }
        print_report(report, console)
        write_json(temporary / REPORT_FILE, report)
        for name in (RUN_FILE, RECIPE_FILE, METRICS_FILE, SEEN_FILE):
            if (run / name).is_file():
                shutil.copyfile(run / name, (temporary / ADAPTER_FOLDER if projector_only else temporary) / name)
        if projector_only:
            _record_apart(temporary, source, output)
        write_serving(temporary, output, rank=_largest_rank(source) if projector_only else None)
    console.print(f"written: {output}, {size / 1e6:,.1f} MB at {size / 1e6 / seconds:,.0f} MB/s", soft_wrap=True)
    return report


def _write_model(folder: Path, source: MergeSource, tensors: list[LazyTensor], dtype: torch.dtype) -> float:
    """Write a stock folder, and return the seconds spent on writing weights."""
    folder.mkdir(exist_ok=True)
    start = time.monotonic()
    write_checkpoint(tensors, folder, dtype, "merging")
    seconds = time.monotonic() - start
    config = source.config
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    config.save_pretrained(folder)
    copy_processor(source, folder)
    return seconds


def _largest_rank(source: MergeSource) -> int:
    return max(layer.down.shape[0] for layer in source.adapter.language_layers().values())


def copy_processor(source: MergeSource, folder: Path) -> None:
    """Copy processor, template and generation config of the run, and the base's `tokenizer.model` for llama.cpp."""
    for name in PROCESSOR_FILES:
        if (source.run / name).is_file():
            shutil.copyfile(source.run / name, folder / name)
    if (source.base / "tokenizer.model").is_file() and not (folder / "tokenizer.model").exists():
        shutil.copyfile(source.base / "tokenizer.model", folder / "tokenizer.model")


def _record_apart(folder: Path, source: MergeSource, output: Path) -> None:
    """Write the records of the separate base and adapter; the adapter's base is the new one."""
    base, adapter = folder / BASE_FOLDER, folder / ADAPTER_FOLDER
    record = source.record
    hashes = component_hashes(base)
    content = {"base": record["base"], "projector_of_recipe": record.get("recipe_hash"), "hashes": hashes}
    write_json(base / BASE_FILE, content)
    new_base = {"name": str(output.resolve() / BASE_FOLDER), "revision": None, "parts": None, "hashes": hashes}
    write_json(adapter / RUN_FILE, record | {"base": new_base, "adapter_sha256": file_hash(adapter / ADAPTER_FILE)})


def write_adapter(folder: Path, source: MergeSource, base_name: str) -> None:
    """Write the language model's LoRA alone, for servers that reject `modules_to_save`.

    The vision tower's LoRA is merged into the base: vLLM takes it with `--enable-tower-connector-lora` only, with the
    language model's scaling, and counts CLIP's tokens without the class token (vllm/model_executor/models/llava.py of
    0.32), which stops its CPU build at the first image.

    Args:
        folder: The new folder.
        source: The run.
        base_name: Name of the base in the adapter's config.
    """
    folder.mkdir()
    tensors = [
        LazyTensor(f"{PEFT_PREFIX}{tensor.name.removeprefix(PEFT_PREFIX)}", tensor.shape, tensor.load)
        for layer in source.adapter.language_layers().values()
        for tensor in (layer.down, layer.up, layer.magnitude)
        if tensor is not None
    ]
    write_file(sorted(tensors, key=lambda tensor: tensor.name), folder / ADAPTER_FILE, torch.float32)
    config = json.loads((source.run / "adapter_config.json").read_text(encoding="utf-8"))
    config |= _without_tower(config, source.adapter)
    config |= {
        "modules_to_save": None,
        "trainable_token_indices": None,
        "base_model_name_or_path": base_name,
        "revision": None,
    }
    write_json(folder / "adapter_config.json", config)
    copy_processor(source, folder)


def _without_tower(config: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Return the settings of an adapter's config that leave the tower's layers out."""
    kept = adapter.language_layers()
    tower = sorted(set(adapter.layers) - set(kept))
    changed: dict[str, Any] = {"exclude_modules": [*(config.get("exclude_modules") or ()), *tower] or None}
    for name in ("rank_pattern", "alpha_pattern"):
        found = (config.get(name) or {}).items()
        changed[name] = {key: value for key, value in found if any(re.fullmatch(rf"(.*\.)?{key}", k) for k in kept)}
    return changed
