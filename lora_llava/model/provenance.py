"""What a base is, by content: a hash for each of its components, recorded with every adapter and checked on loading."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lora_llava.core.errors import UserError
from lora_llava.core.storage import find_damage
from lora_llava.model.base import BaseParts, build_base, cache_folder
from lora_llava.model.weights.names import COMPONENTS, canonical_name, component_of
from lora_llava.model.weights.parts import load_part, local_folder
from lora_llava.model.weights.tensor_files import LazyTensor, lazy_tensors, weight_files

_THREADS = 4
"""SHA-256 releases the GIL; more threads than this wait for the disk."""


def component_hashes(folder: Path) -> dict[str, str]:
    """Hash a LLaVA's language model, vision tower and projector: names, dtypes, shapes and values.

    The same weights give the same hashes under either layout of names and however they are cut into shards. Results are
    kept in the cache by the files' sizes and times, so that a 7B base is read once.

    Args:
        folder: A base folder or a complete LLaVA.

    Returns:
        SHA-256 by `llm`, `vision_tower` and `projector`.

    Raises:
        UserError: Where the folder's weights are missing or damaged.
    """
    kept = cache_folder() / "hashes" / f"{weights_state(folder)}.json"
    with contextlib.suppress(FileNotFoundError, ValueError):  # a file cut short counts as none
        return dict(json.loads(kept.read_text()))
    digests = {part: hashlib.sha256() for part in COMPONENTS}
    tensors = sorted(lazy_tensors(folder), key=lambda tensor: canonical_name(tensor.name))
    progress = tqdm(desc="hashing the base", total=len(tensors), unit="tensor", leave=False, dynamic_ncols=True)
    with ThreadPoolExecutor(_THREADS) as pool, progress as bar:
        for tensor, line in zip(tensors, pool.map(_describe, tensors), strict=True):
            bar.update()
            part = component_of(canonical_name(tensor.name))
            if part is not None:
                digests[part].update(line.encode())
    found = {part: digest.hexdigest() for part, digest in digests.items()}
    for part, digest in found.items():
        if digest == hashlib.sha256().hexdigest():
            raise UserError(f"{folder} holds no weights of a {part.replace('_', ' ')}; it is not a whole LLaVA")
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(found) + "\n")
    temporary.replace(kept)
    return found


def _describe(tensor: LazyTensor) -> str:
    value = tensor.load().contiguous()
    digest = hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    return f"{canonical_name(tensor.name)} {value.dtype} {tuple(value.shape)} {digest}\n"


def weights_state(folder: Path) -> str:
    """A hash over a folder's place and its weight files' sizes and times: changes when one of them does."""
    files = [(folder / name).stat() for name in weight_files([file.name for file in folder.iterdir()])]
    content = [str(folder.resolve()), *((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in files)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def locate_base(recorded: Mapping[str, Any], adapter: Path) -> Path:
    """Find the base that an adapter stands on, and hold that it is that one.

    Args:
        recorded: `base` of the adapter's `run.json`: `name`, `revision`, `parts`, and `hashes` where it has them.
        adapter: The adapter's folder, for messages.

    Returns:
        The base's folder; a Hub id is fetched if need be, an assembled base that is gone is assembled again.

    Raises:
        UserError: Where it is gone, or another one stands there.
    """
    name, parts = str(recorded["name"]), recorded.get("parts")
    folder = local_folder(name, "start_from.llava")
    beside = adapter.parent / "base"  # as `merge --projector-only` leaves them, wherever they were moved
    if folder is None and parts is None and (beside / "config.json").is_file():
        folder = beside
    if folder is not None and parts is not None and folder.parent == cache_folder() / "bases" and find_damage(folder):
        folder = None
    if folder is None and Path(name).is_absolute():
        folder = _assembled_again(name, parts, adapter)
    if folder is None:
        folder = load_part(name, recorded.get("revision"), "start_from.llava").folder
    check_base(recorded, folder, adapter)
    return folder


def _assembled_again(name: str, parts: Mapping[str, Any] | None, adapter: Path) -> Path:
    gone = f"{adapter} stands on {name}, which is {'damaged' if Path(name).is_dir() else 'gone'}"
    if parts is None:
        raise UserError(f"{gone}; put it back there, or train again")
    base = BaseParts(**parts)
    folder = cache_folder() / "bases" / base.key
    if folder.is_dir() and find_damage(folder) is None:
        return folder
    if base.projector is not None:
        raise UserError(f"{gone}; put it back there, or train again")
    found = {
        field: load_part(parts[field], _commit_of(parts[f"{field}_revision"]), field)
        for field in ("llm", "vision_tower")
    }
    for field, part in found.items():
        if part.revision != parts[f"{field}_revision"]:
            raise UserError(
                f"{gone}, and {part.name} is not what it was ({part.revision[:12]}, the adapter's {field} is "
                f"{parts[f'{field}_revision'][:12]}); name the old one, or train again"
            )
    return build_base(base, found["llm"], found["vision_tower"], None)


def _commit_of(revision: str) -> str | None:
    """A Hub commit; None for the content hash of a folder, which is longer."""
    return revision if len(revision) == 40 else None


def check_base(recorded: Mapping[str, Any], folder: Path, adapter: Path) -> None:
    """Hold that a folder is the base that an adapter was trained on.

    Args:
        recorded: `base` of the adapter's `run.json`.
        folder: What it is to be loaded on.
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
                f"holds ({found[part][:12]}); put back the base it was trained on"
            )
