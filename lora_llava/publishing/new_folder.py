"""Write a folder atomically, after checking that it is new and fits on the disk."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_llava.core.errors import UserError
from lora_llava.core.storage import cache_folder, locked, share

_SPARE_BYTES = 64 * 2**20
"""Space for tokenizer, configs and reports."""


def check_new(output: Path) -> None:
    """Check that a folder to be written does not exist.

    Raises:
        UserError: If it exists.
    """
    if output.exists():
        raise UserError(f"{output} exists already; choose another --output, or remove it")


def check_disk(output: Path, weights: int) -> None:
    """Check that a model fits on the disk, before writing.

    Args:
        output: The folder to write.
        weights: Bytes of its weights.

    Raises:
        UserError: If it does not fit, with the bytes needed and free.
    """
    needed = weights + _SPARE_BYTES
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    usage = shutil.disk_usage(existing)
    if not existing.is_dir() or not os.access(existing, os.W_OK) or usage.total == 0:
        raise UserError(f"{output}: {existing} is not writable; choose another --output")
    free = usage.free
    if needed > free:
        raise UserError(
            f"{output} needs {needed:,} bytes ({needed / 1e9:.1f} GB), but {free:,} ({free / 1e9:.1f} GB) are free; "
            "free some space, or choose an --output on another disk"
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Create a temporary folder that is renamed to `output` at the end, or removed on any failure.

    The leftovers of a killed process are removed first; a lock protects those of a live one.

    Raises:
        UserError: If another process is writing the same folder.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.partial")
    key = hashlib.sha256(str(output.absolute()).encode()).hexdigest()[:20]
    busy = f"{output} is being written by another process; choose another --output"
    with locked(cache_folder() / "outputs" / key, busy):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            share(temporary)
            temporary.rename(output)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
