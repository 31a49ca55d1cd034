"""Folders that the processes of a suite write once for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock


def once(factory: pytest.TempPathFactory, name: str, write: Callable[[Path], Any]) -> Path:
    """Return a folder of the suite, written by the first process that needs it; no test may change it.

    Args:
        factory: Pytest's.
        name: Name of the folder; one name has one content.
        write: Fills the folder, which is empty.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once" / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not (folder / ".complete").exists():
            (folder / "content").mkdir()
            write(folder / "content")
            (folder / ".complete").touch()
    return folder / "content"
