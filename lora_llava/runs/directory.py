"""The run directory: what is needed to load a finished run, and how it was made."""

from __future__ import annotations

import contextlib
import copy
import errno
import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lora_llava.core.errors import UserError
from lora_llava.core.storage import atomic_file, file_hash, share
from lora_llava.data.files.row_files import json_text
from lora_llava.data.templates.spans import AnyTemplate
from lora_llava.data.tokens import stop_of
from lora_llava.model.adapters import save_adapter
from lora_llava.model.initialization import NEEDS_NF4
from lora_llava.model.loading import resolve_dtype
from lora_llava.model.start import RUN_FILE, Base
from lora_llava.model.weights.names import ADAPTER_FILE
from lora_llava.planning.run_plan import RunPlan
from lora_llava.recipe import Recipe, dump_recipe, load_recipe, recipe_hash
from lora_llava.recipe.io import RECIPE_FILE
from lora_llava.recipe.places import find_inputs

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "trl",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "pillow",
    "lora_llava",
)
METRICS_FILE, DATA_FILE = "metrics.json", "data.json"
LOCK_RECORD = ".lock.json"
"""Which process trains in a run directory."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a run uses."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Describe the machine: its GPU, or else the model and cores of the processor."""
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        return {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), "gpu_memory_bytes": memory}
    return {"gpu": None, "processor": processor_name(), "cores": os.cpu_count()}


def peak_memory(train: dict[str, Any]) -> str:
    """Describe the peak memory of a run, from the `train` entry of its `metrics.json`."""
    reserved = train.get("peak_reserved_bytes")
    text = f"{train['peak_memory_bytes'] / 2**30:.2f} GiB"
    return text if reserved is None else f"{text}, {reserved / 2**30:.2f} GiB with the allocator's free blocks"


def processor_name() -> str:
    """Return the processor's model, or its architecture if the model is unknown."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_json(file: Path, content: Any) -> None:
    """Write JSON to a temporary file and rename it, so that a reader never sees part of a file."""
    with atomic_file(file) as temporary:
        temporary.write_text(json_text(content, indent=2) + "\n", encoding="utf-8")


def start_run(folder: Path, recipe: Recipe, data: dict[str, str]) -> None:
    """Create the run directory with the resolved recipe and a hash of each split's rows.

    Args:
        folder: The run directory.
        recipe: The resolved recipe.
        data: Hashes by split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / DATA_FILE, data)
    (folder / RECIPE_FILE).write_text(dump_recipe(find_inputs(recipe, None)), encoding="utf-8")


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Lock a run directory for the `with` block.

    Args:
        folder: The run directory.

    Raises:
        UserError: If another run holds the lock, or the folder cannot be written.
    """
    lock, holder = folder / ".lock", folder / LOCK_RECORD
    held = FileLock(lock)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=0)
        write_json(holder, {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")})
    except Timeout:
        try:
            other = json.loads(holder.read_text(encoding="utf-8"))
            owner = f"process {other['process']} on {other['host']}, since {other['since']},"
        except (OSError, ValueError, KeyError, TypeError):
            owner = "another run"
        raise UserError(f"output_dir: {owner} is at work in {folder}; wait for it, or set output_dir=OTHER") from None
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise UserError(f"output_dir: {folder} cannot be written ({error.strerror}); set output_dir=OTHER") from None
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        held.release()


def read_data_hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of a run's or checkpoint's rows by split; empty if it has none."""
    try:
        return dict(json.loads((folder / DATA_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def save_model(
    folder: Path, model: PeftModel, plan: RunPlan, base: Base, weights: dict[str, Any] | None = None
) -> None:
    """Save adapter, projector, processor and generation config; `run.json` last, as the mark of a complete run.

    Args:
        folder: The run directory.
        model: The trained PEFT model.
        plan: The plan of the run, with the processor, the template and the resolved recipe.
        base: The base of the adapter.
        weights: The weights to save by name; None saves those of the model.
    """
    recipe, processor = plan.recipe, plan.processor
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path, config.revision = base.name, base.revision
    save_adapter(model, folder, weights)
    processor.tokenizer.padding_side = "left"  # for generation, which is what a saved run is used for
    processor.save_pretrained(folder)
    processor.tokenizer.padding_side = "right"
    generation = copy.deepcopy(model.get_base_model().generation_config)
    set_stops(generation, plan.tokenizer, plan.template)
    generation.save_pretrained(folder)
    share(folder / ADAPTER_FILE)
    dtype = str(resolve_dtype(recipe.model.dtype)).removeprefix("torch.")
    content = {
        "stage": recipe.stage,
        "base": base.as_dict(),
        "dtype": dtype,
        "recipe_hash": recipe_hash(recipe),
        "hub_ids": hub_ids(recipe),
        "stage1": _stage1_of(recipe),
        "continues": _continues(recipe),
        "adapter_sha256": file_hash(folder / ADAPTER_FILE),
        "versions": versions(),
    }
    if recipe.lora is not None and recipe.lora.init == NEEDS_NF4:
        content["needs_base"] = "nf4"
    write_json(folder / RUN_FILE, content)


def set_stops(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase, template: AnyTemplate) -> None:
    """Add the ids and the text at which a template's answers stop to a generation config."""
    saved = generation.eos_token_id
    ids = [saved] if isinstance(saved, int) else saved or []
    stop = stop_of(tokenizer, template.stop, template.stop_string)
    ids = list(dict.fromkeys([*ids, *stop.ids]))
    generation.eos_token_id = ids[0] if len(ids) == 1 else ids
    generation.stop_strings = [stop.text] if stop.text else None


def hub_ids(recipe: Recipe) -> list[str]:
    """Return the names in a recipe that are Hub ids and not folders on this machine."""
    start = recipe.model.start_from
    data = [source.path for source in recipe.data.all_sources()]
    names = [recipe.model.llm, recipe.model.vision_tower, start.projector, start.llava, *data]
    return [name for name in names if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()]


def _stage1_of(recipe: Recipe) -> dict[str, Any] | None:
    """Describe the data and recipe of the run's Stage 1."""
    run = recipe.model.start_from.stage1_run
    if run is None or not (Path(run) / RECIPE_FILE).is_file():
        return None
    stage1, record = load_recipe(Path(run) / RECIPE_FILE), read_record(Path(run))
    data = ", ".join(dict.fromkeys(source.path for source in stage1.data.train_sources()))
    return {"data": data, "recipe_hash": record["recipe_hash"], "hub_ids": hub_ids(stage1)}


def _continues(recipe: Recipe) -> dict[str, Any] | None:
    """Describe the run that a run continues, and under `continues` the one before that."""
    run = recipe.model.start_from.run
    if run is None:
        return None
    before, record = load_recipe(Path(run) / RECIPE_FILE), read_record(Path(run))
    return {
        "run": str(getattr(run, "written", run)),
        "adapter_sha256": record.get("adapter_sha256"),
        "recipe_hash": record["recipe_hash"],
        "data": list(dict.fromkeys(source.path for source in before.data.train_sources())),
        "hub_ids": hub_ids(before),
        "stage1": record.get("stage1"),
        "continues": record.get("continues"),
    }


def is_run(folder: Path) -> bool:
    """Check whether a folder is a finished run."""
    return (folder / RUN_FILE).is_file() and (folder / ADAPTER_FILE).is_file()


def read_record(folder: Path) -> dict[str, Any]:
    """Read a finished run's `run.json`.

    Raises:
        UserError: If the folder is not a finished run.
    """
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist; name a run directory")
    if not is_run(folder):
        if (folder / "config.json").is_file():
            raise UserError(f"{folder} is a complete model, not a run; name a run directory")
        raise UserError(f"{folder} is not a finished run; it has no {RUN_FILE} with {ADAPTER_FILE}")
    try:
        content = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder}/{RUN_FILE} is not JSON ({error}); restore it") from None
    base = content.get("base") if isinstance(content, dict) else None
    if not isinstance(base, dict) or "name" not in base:
        raise UserError(f"{folder}/{RUN_FILE} names no base model; restore it")
    return dict(content)
