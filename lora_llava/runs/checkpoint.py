"""Checkpoints that are written completely or not at all, and verified byte by byte before they are read."""

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
from lora_llava.core.storage import file_hash, is_disk_full, share

MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = ".partial"
_MARGIN = 16 << 20
"""Bytes needed besides weights and states: tokenizer, JSON, file system overhead."""


class DiskFullError(UserError):
    """The disk has no room for a checkpoint."""


@contextlib.contextmanager
def atomic_checkpoint(folder: Path, about: dict[str, Any], needed: int = 0) -> Iterator[Path]:
    """Write a checkpoint atomically: write and sync a temporary folder, then its manifest, then rename the folder.

    If the process or machine stops at any point, the folder is as it was before. A checkpoint of the same name is
    replaced.

    Args:
        folder: `checkpoint-STEP`.
        about: Entries of the manifest besides the files.
        needed: Bytes that the checkpoint will take; 0 if unknown.

    Yields:
        The folder to write into.

    Raises:
        DiskFullError: If there is no room for it.
        UserError: If the folder cannot be written.
    """
    staging = folder.with_name(f".{folder.name}{_PARTIAL}")
    try:
        with _report_write_errors(folder, needed):
            _check_room(folder, needed)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            yield staging
            _seal(staging, about)
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(staging, folder)
            sync_folder(folder.parent)
            sync_folder(folder.parent.parent)  # the folder of checkpoints may be new
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _check_room(folder: Path, needed: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if needed and free < needed + _MARGIN:
        raise _no_room(folder, needed + _MARGIN)


@contextlib.contextmanager
def _report_write_errors(folder: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # safetensors wraps system errors in its own exceptions
        if is_disk_full(error, folder.parent):
            raise _no_room(folder, needed) from None
        if isinstance(error, OSError):
            raise UserError(f"{folder} cannot be written ({error.strerror or error}); fix that") from None
        raise


def _no_room(folder: Path, needed: int) -> DiskFullError:
    free = shutil.disk_usage(folder.parent).free
    required = f"needs {needed:,} bytes and " if needed else ""
    return DiskFullError(f"the disk is full: {folder} {required}has {free:,} free; make room")


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
    """Sync a file to the disk."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to the disk, if the system can (Windows cannot)."""
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
        Its content: `step`, `recipe_hash`, `files` with `bytes` and `sha256`, and its other entries.

    Raises:
        UserError: If it is missing or has changed since it was written.
    """
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        recorded = content.pop("sha256")
        body = json.dumps(content, indent=2, sort_keys=True)
        valid = recorded == _hash(body) and content["format"] == _FORMAT and isinstance(content["step"], int)
        valid = valid and all(_is_entry(name, each) for name, each in content["files"].items())
    except FileNotFoundError:
        raise UserError(f"{folder} has no {MANIFEST_FILE}") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        valid = False
    if not valid:
        raise UserError(f"{folder}/{MANIFEST_FILE} has changed since it was written")
    return dict(content)


def _is_entry(name: str, recorded: Any) -> bool:
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and isinstance(recorded["bytes"], int) and isinstance(recorded["sha256"], str)


def find_damage(folder: Path) -> str | None:
    """Check every file of a checkpoint against its manifest.

    Args:
        folder: The checkpoint.

    Returns:
        A short description of the first damage; None if every byte is unchanged.
    """
    try:
        listed = read_manifest(folder)["files"]
    except UserError as error:
        return str(error).removeprefix(str(folder)).lstrip("/ ")
    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    seen = {name for name in present if not Path(name).name.startswith(".")}  # desktops and NFS leave hidden files
    if unknown := seen - listed.keys() - {MANIFEST_FILE}:
        return f"{min(unknown)} is not in its manifest"
    damages = (_damage_of(folder / name, name, entry) for name, entry in listed.items())
    return next((damage for damage in damages if damage), None)


def _damage_of(file: Path, name: str, entry: dict[str, Any]) -> str | None:
    try:
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes in place of {entry['bytes']:,}"
        return None if file_hash(file) == entry["sha256"] else f"{name} has changed since it was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first, without checking them."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), each) for each in folder.iterdir() if (match := _NAME.fullmatch(each.name))]
    return [each for _, each in sorted(found, reverse=True)]


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest complete checkpoint.

    Args:
        folder: The folder of checkpoints.

    Returns:
        The checkpoint, or None if none is complete; and the damage of each newer one that was skipped.
    """
    skipped: list[str] = []
    for each in list_checkpoints(folder):
        damage = find_damage(each)
        if damage is None:
            return each, skipped
        skipped.append(f"{each.name}: {damage}")
    return None, skipped


def best_of_run(folder: Path, step: int, is_own: Callable[[Path], bool]) -> Path:
    """Find the best checkpoint by its step; works in a run folder that was moved.

    Args:
        folder: The folder of the run's checkpoints.
        step: Step of the best checkpoint.
        is_own: Checks whether a checkpoint belongs to this run.

    Returns:
        The checkpoint.

    Raises:
        UserError: If it is missing, damaged, or belongs to another run.
    """
    best = folder / f"checkpoint-{step}"
    if not best.is_dir():
        problem = "is missing"
    elif damage := find_damage(best):
        problem = f"is damaged ({damage})"
    elif not is_own(best):
        problem = "belongs to another run"
    else:
        return best
    named = f"{best}, the checkpoint with the lowest validation loss,"
    raise UserError(f"{named} {problem}; restore it, or run with --overwrite")


def set_aside(folder: Path, start: Path) -> None:
    """Rename checkpoints that are newer than the one a run resumes from, to free their names.

    Args:
        folder: The folder of checkpoints.
        start: The newest complete one; newer ones are kept as `damaged-checkpoint-STEP`.
    """
    for each in itertools.takewhile(lambda each: each.name != start.name, list_checkpoints(folder)):
        aside = each.with_name(f"damaged-{each.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(each, aside)


def remove_old(folder: Path, keep: int, best: str | None) -> None:
    """Remove all but the newest checkpoints and the best one, after verifying the newest.

    Args:
        folder: The folder of checkpoints.
        keep: How many of the newest to keep.
        best: Path of the best one; only its name is used.

    Raises:
        UserError: If the newest is damaged; nothing is removed then.
    """
    found = list_checkpoints(folder)
    if found and (damage := find_damage(found[0])):
        raise UserError(f"{found[0]} is damaged ({damage}); check the disk. The checkpoint before it is kept")
    kept = {each.name for each in found[:keep]} | ({Path(best).name} if best else set())
    for each in found:
        if each.name not in kept:
            shutil.rmtree(each, ignore_errors=True)
    for each in folder.glob(f".checkpoint-*{_PARTIAL}"):
        shutil.rmtree(each, ignore_errors=True)
