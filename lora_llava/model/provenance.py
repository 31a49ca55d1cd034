"""Hashes of a base's components, recorded with every adapter and checked on loading."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.core.storage import atomic_file, cache_folder, find_damage
from lora_llava.model.base import BaseParts, build_base
from lora_llava.model.weights.names import COMPONENTS, canonical_name, component_of
from lora_llava.model.weights.parts import load_part, local_folder
from lora_llava.model.weights.tensor_files import LazyTensor, lazy_tensors, weight_files

_THREADS = 4
"""Hashing threads: SHA-256 releases the GIL, and more threads would wait for the disk."""


def component_hashes(folder: Path) -> dict[str, str]:
    """Hash a LLaVA's language model, vision tower and projector: names, dtypes, shapes and values.

    The hashes do not depend on the layout of names or on the shards. They are cached by the files' sizes and times, so
    that a 7B base is read once.

    Args:
        folder: A base folder or a complete LLaVA.

    Returns:
        SHA-256 by `llm`, `vision_tower` and `projector`.

    Raises:
        UserError: If the folder's weights are missing or damaged.
    """
    kept = cache_folder() / "hashes" / f"{weights_state(folder)}.json"
    with contextlib.suppress(FileNotFoundError, ValueError):  # a truncated file counts as missing
        return dict(json.loads(kept.read_text()))
    digests = {part: hashlib.sha256() for part in COMPONENTS}
    tensors = sorted(lazy_tensors(folder), key=lambda tensor: canonical_name(tensor.name))
    progress = progress_bar(desc="hashing the base", total=len(tensors), unit="tensor", leave=False)
    with ThreadPoolExecutor(_THREADS) as pool, progress as bar:
        for tensor, line in zip(tensors, pool.map(_describe, tensors), strict=True):
            bar.update()
            part = component_of(canonical_name(tensor.name))
            if part is not None:
                digests[part].update(line.encode())
    found = {part: digest.hexdigest() for part, digest in digests.items()}
    for part, digest in found.items():
        if digest == hashlib.sha256().hexdigest():
            raise UserError(f"{folder} has no weights of a {part.replace('_', ' ')}; it is not a complete LLaVA")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(kept) as temporary:
        temporary.write_text(json.dumps(found) + "\n")
    return found


def _describe(tensor: LazyTensor) -> str:
    value = tensor.load().contiguous()
    digest = hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    return f"{canonical_name(tensor.name)} {value.dtype} {tuple(value.shape)} {digest}\n"


def weights_state(folder: Path) -> str:
    """Hash a folder's path and its weight files' sizes and times."""
    files = [(folder / name).stat() for name in weight_files([file.name for file in folder.iterdir()])]
    content = [str(folder.resolve()), *((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in files)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def locate_base(recorded: Mapping[str, Any], adapter: Path) -> Path:
    """Find the base of an adapter, and check that it has not changed.

    Args:
        recorded: `base` of the adapter's `run.json`: `name`, `revision`, `parts`, and `hashes` if it has them.
        adapter: The adapter's folder, for messages.

    Returns:
        The base's folder; a Hub id is downloaded if needed, and an assembled base that is missing is assembled again.

    Raises:
        UserError: If it is missing or has changed.
    """
    name, parts = str(recorded["name"]), recorded.get("parts")
    folder = local_folder(name, "start_from.llava")
    beside = adapter.parent / "base"  # `merge --projector-only` writes both, and they may be moved together
    if folder is None and parts is None and (beside / "config.json").is_file():
        folder = beside
    if folder is not None and parts is not None and folder.parent == cache_folder() / "bases" and find_damage(folder):
        folder = None
    if folder is None and Path(name).is_absolute():
        folder = _assemble_again(name, parts, adapter)
    if folder is None:
        folder = load_part(name, recorded.get("revision"), "start_from.llava").folder
    check_base(recorded, folder, adapter)
    return folder


def _assemble_again(name: str, parts: Mapping[str, Any] | None, adapter: Path) -> Path:
    problem = f"{adapter} needs its base {name}, which is {'damaged' if Path(name).is_dir() else 'missing'}"
    if parts is None:
        raise UserError(f"{problem}; restore it, or train again")
    base = BaseParts(**parts)
    folder = cache_folder() / "bases" / base.key
    if folder.is_dir() and find_damage(folder) is None:
        return folder
    if base.projector is not None:
        raise UserError(f"{problem}; restore it, or train again")
    found = {
        field: load_part(parts[field], _commit_of(parts[f"{field}_revision"]), field)
        for field in ("llm", "vision_tower")
    }
    for field, part in found.items():
        if part.revision != parts[f"{field}_revision"]:
            raise UserError(
                f"{problem}, and {part.name} has changed ({part.revision[:12]}, the adapter's {field} is "
                f"{parts[f'{field}_revision'][:12]}); restore it, or train again"
            )
    return build_base(base, found["llm"], found["vision_tower"], None)


def _commit_of(revision: str) -> str | None:
    """Return a Hub commit; None for the hash of a folder's contents, which is longer."""
    return revision if len(revision) == 40 else None


def check_base(recorded: Mapping[str, Any], folder: Path, adapter: Path) -> None:
    """Check that a folder is the base that an adapter was trained on.

    Args:
        recorded: `base` of the adapter's `run.json`.
        folder: The folder of the base to load.
        adapter: The adapter's folder, for messages.

    Raises:
        UserError: Naming the component that differs, with both hashes.
    """
    hashes = recorded.get("hashes")
    if not hashes:
        return
    found = component_hashes(folder)
    names = recorded.get("parts") or {}
    for part, digest in hashes.items():
        if found[part] != digest:
            name = (names.get(part) if part != "projector" else None) or recorded["name"]
            raise UserError(
                f"{adapter} was trained on another {part.replace('_', ' ')} ({name}, {digest[:12]}) than {folder} "
                f"holds ({found[part][:12]}); restore the base it was trained on"
            )
