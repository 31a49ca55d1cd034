"""Disks that fail now and then."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_llava.core.retry import patiently


def failing(times: int, number: int) -> tuple[Callable[[], str], list[int]]:
    tries: list[int] = []

    def read() -> str:
        tries.append(1)
        if len(tries) <= times:
            raise OSError(number, "of the disk")
        return "content"

    return read, tries


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_what_passes_is_waited_for(number: int) -> None:
    read, tries = failing(2, number)
    assert patiently(read, (0.0, 0.0, 0.0)) == "content"
    assert len(tries) == 3


def test_what_stays_is_told_after_the_last_try() -> None:
    read, tries = failing(9, errno.EIO)
    with pytest.raises(OSError, match="of the disk"):
        patiently(read, (0.0, 0.0, 0.0))
    assert len(tries) == 4


def test_what_does_not_pass_is_told_at_once(tmp_path: Path) -> None:
    read, tries = failing(1, errno.EACCES)
    with pytest.raises(PermissionError):
        patiently(read)
    assert len(tries) == 1
    with pytest.raises(FileNotFoundError):
        patiently((tmp_path / "gone").read_bytes)
