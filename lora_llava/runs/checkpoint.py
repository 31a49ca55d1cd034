"""Checkpoints that are there whole or not at all, and are read only where every byte is as it was written."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.core.storage import is_disk_full, share
from lora_llava.data.files.reading import file_hash

MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = ".partial"
_MARGIN = 16 << 20
"""Bytes beside weights and states: tokenizer, JSON, the file system's own."""


class DiskFullError(UserError):
    """There is no room for a checkpoint."""


@contextlib.contextmanager
def atomic_checkpoint(folder: Path, about: dict[str, Any], needed: int = 0) -> Iterator[Path]:
    """Write a checkpoint: into a folder beside, every file synced, then the manifest, then renamed.

    A process or machine that stops anywhere in it leaves what was there before. A checkpoint of the same name is
    replaced.

    Args:
        folder: `checkpoint-STEP`.
        about: What the manifest tells beside the files.
        needed: Bytes that it will take, where it can be told.

    Yields:
        The folder to write into.

    Raises:
        DiskFullError: Where there is no room for it.
        UserError: Where the folder cannot be written.
    """
    staging = folder.with_name(f".{folder.name}{_PARTIAL}")
    try:
        with _told(folder, needed):
            _check_room(folder, needed)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            yield staging
            _seal(staging, about)
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(staging, folder)
            sync_folder(folder.parent)
            sync_folder(folder.parent.parent)  # the folder of all of them may be new
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _check_room(folder: Path, needed: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if needed and free < needed + _MARGIN:
        raise _no_room(folder, needed + _MARGIN)


@contextlib.contextmanager
def _told(folder: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # safetensors has exceptions of its own for what the system says
        if is_disk_full(error, folder.parent):
            raise _no_room(folder, needed) from None
        if isinstance(error, OSError):
            told = f"{folder} cannot be written ({error.strerror or error})"
            raise UserError(f"{told}; mend that") from None
        raise


def _no_room(folder: Path, needed: int) -> DiskFullError:
    free = shutil.disk_usage(folder.parent).free
    wanted = f"needs {needed:,} bytes and " if needed else ""
    return DiskFullError(f"the disk is full: {folder} {wanted}has {free:,} free; make room")


def _seal(staging: Path, about: dict[str, Any]) -> None:
    share(staging)
    files = sorted(file for file in staging.rglob("*") if file.is_file())
    listed = {
        file.relative_to(staging).as_posix(): {"bytes": file.stat().st_size, "sha256": file_hash(file)}
        for file in files
    }
    for file in files:
        sync_file(file)
    content = {"format": _FORMAT, **about, "files": listed}
    body = json.dumps(content, indent=2, sort_keys=True)
    content["sha256"] = _hash(body)
    manifest = staging / MANIFEST_FILE
    manifest.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sync_file(manifest)
    for each in sorted({file.parent for file in files} | {staging}):
        sync_folder(each)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sync_file(file: Path) -> None:
    """Wait until a file's content is on the disk."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk, where a system can (Windows cannot)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest.

    Args:
        folder: The checkpoint.

    Returns:
        Its content: `step`, `recipe_hash`, `files` with `bytes` and `sha256`, and what else it tells.

    Raises:
        UserError: Where there is none, or it is not as it was written.
    """
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        told = content.pop("sha256")
        body = json.dumps(content, indent=2, sort_keys=True)
        whole = told == _hash(body) and content["format"] == _FORMAT and isinstance(content["step"], int)
        whole = whole and all(_is_entry(name, each) for name, each in content["files"].items())
    except FileNotFoundError:
        raise UserError(f"{folder} has no {MANIFEST_FILE}") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{folder}/{MANIFEST_FILE} is not as it was written")
    return dict(content)


def _is_entry(name: str, told: Any) -> bool:
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and isinstance(told["bytes"], int) and isinstance(told["sha256"], str)


def find_damage(folder: Path) -> str | None:
    """Hold every file of a checkpoint against its manifest.

    Args:
        folder: The checkpoint.

    Returns:
        What is wrong, in a few words; None where every byte is as it was written.
    """
    try:
        listed = read_manifest(folder)["files"]
    except UserError as error:
        return str(error).removeprefix(str(folder)).lstrip("/ ")
    there = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    seen = {name for name in there if not Path(name).name.startswith(".")}  # desktops and NFS leave hidden ones
    if strange := seen - listed.keys() - {MANIFEST_FILE}:
        return f"{min(strange)} was not written with it"
    damages = (_damage_of(folder / name, name, told) for name, told in listed.items())
    return next((damage for damage in damages if damage), None)


def _damage_of(file: Path, name: str, told: dict[str, Any]) -> str | None:
    try:
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != told["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes in place of {told['bytes']:,}"
        return None if file_hash(file) == told["sha256"] else f"{name} is not as it was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first, whole or not."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), each) for each in folder.iterdir() if (match := _NAME.fullmatch(each.name))]
    return [each for _, each in sorted(found, reverse=True)]


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies.

    Args:
        folder: Where checkpoints are.

    Returns:
        It, or None where none does; and of each newer one why it is passed over.
    """
    passed_over: list[str] = []
    for each in list_checkpoints(folder):
        damage = find_damage(each)
        if damage is None:
            return each, passed_over
        passed_over.append(f"{each.name}: {damage}")
    return None, passed_over


def best_of_run(folder: Path, step: int, is_own: Callable[[Path], bool]) -> Path:
    """The best checkpoint, found by its step in the run's own folder, wherever that was moved to.

    Args:
        folder: Where the run's checkpoints are.
        step: The best one's.
        is_own: Whether a checkpoint is this run's.

    Returns:
        The checkpoint.

    Raises:
        UserError: Where it is missing, damaged, or another run's.
    """
    best = folder / f"checkpoint-{step}"
    if not best.is_dir():
        problem = "is missing"
    elif damage := find_damage(best):
        problem = f"is damaged ({damage})"
    elif not is_own(best):
        problem = "is another run's"
    else:
        return best
    best_is = f"{best}, the checkpoint with the lowest validation loss,"
    raise UserError(f"{best_is} {problem}; put it back, or run with --overwrite")


def set_aside(folder: Path, start: Path) -> None:
    """Rename checkpoints that are newer than the one a run goes on from, so that its own get their names.

    Args:
        folder: Where checkpoints are.
        start: The newest that is whole; the others are kept as `damaged-checkpoint-STEP`.
    """
    for each in itertools.takewhile(lambda each: each.name != start.name, list_checkpoints(folder)):
        aside = each.with_name(f"damaged-{each.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(each, aside)


def remove_old(folder: Path, keep: int, best: str | None) -> None:
    """Remove all but the newest checkpoints and the best, once the newest verifies.

    Args:
        folder: Where checkpoints are.
        keep: How many at least.
        best: The best one's path, of which the name counts.

    Raises:
        UserError: Where the newest does not verify: nothing is removed then.
    """
    found = list_checkpoints(folder)
    if found and (damage := find_damage(found[0])):
        raise UserError(f"{found[0]} was not written well ({damage}); check the disk. The checkpoint before is kept")
    kept = {each.name for each in found[:keep]} | ({Path(best).name} if best else set())
    for each in found:
        if each.name not in kept:
            shutil.rmtree(each, ignore_errors=True)
    for each in folder.glob(f".checkpoint-*{_PARTIAL}"):
        shutil.rmtree(each, ignore_errors=True)
