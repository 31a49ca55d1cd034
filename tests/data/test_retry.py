"""Reads from disks that fail temporarily."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_llava.core.retry import retry


def failing(times: int, number: int) -> tuple[Callable[[], str], list[int]]:
    tries: list[int] = []

    def read() -> str:
        tries.append(1)
        if len(tries) <= times:
            raise OSError(number, "of the disk")
        return "content"

    return read, tries


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_temporary_failure_is_retried(number: int) -> None:
    read, tries = failing(2, number)
    assert retry(read, (0.0, 0.0, 0.0)) == "content"
    assert len(tries) == 3


def test_a_lasting_failure_is_raised_after_the_last_try() -> None:
    read, tries = failing(9, errno.EIO)
    with pytest.raises(OSError, match="of the disk"):
        retry(read, (0.0, 0.0, 0.0))
    assert len(tries) == 4


def test_other_failures_are_raised_at_once(tmp_path: Path) -> None:
    read, tries = failing(1, errno.EACCES)
    with pytest.raises(PermissionError):
        retry(read)
    assert len(tries) == 1
    with pytest.raises(FileNotFoundError):
        retry((tmp_path / "gone").read_bytes)
