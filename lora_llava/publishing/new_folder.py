"""A folder that is either whole or not there, and a disk that holds it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_llava.core.errors import UserError
from lora_llava.core.storage import locked, share
from lora_llava.model.base import cache_folder

_SPARE_BYTES = 64 * 2**20
"""For tokenizer, configs and reports."""


def check_new(output: Path) -> None:
    """Hold that nothing stands where a folder is to be written.

    Raises:
        UserError: Where something does.
    """
    if output.exists():
        raise UserError(f"{output} is there already; name another --output, or remove it")


def check_disk(output: Path, weights: int) -> None:
    """Hold that the disk has room for a model, before a byte is written.

    Args:
        output: Where it goes.
        weights: Bytes of its weights.

    Raises:
        UserError: With the bytes needed and free.
    """
    needed = weights + _SPARE_BYTES
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    usage = shutil.disk_usage(existing)
    if not existing.is_dir() or not os.access(existing, os.W_OK) or usage.total == 0:
        raise UserError(f"{output}: {existing} cannot be written to; name another --output")
    free = usage.free
    if needed > free:
        raise UserError(
            f"{output}: needs {needed:,} bytes ({needed / 1e9:.1f} GB) and {free:,} ({free / 1e9:.1f} GB) are free; "
            "free some, or name an --output on another disk"
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that becomes it at the end, and goes on any failure.

    What a killed process left of it is removed at the next start; a live one holds the lock.

    Raises:
        UserError: Where another process is writing the same folder.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.partial")
    key = hashlib.sha256(str(output.absolute()).encode()).hexdigest()[:20]
    busy = f"{output} is being written by another process; name another --output"
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
