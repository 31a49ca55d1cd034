"""The ranks of a distributed run: their number, their order and the values they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

_PATIENCE = timedelta(days=7)
"""How long ranks wait for the one that writes a shared file; the launcher ends all if one of them dies."""


def this_rank() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks; the first call connects them."""
    state = PartialState(cpu=not torch.cuda.is_available())
    return state.process_index, state.num_processes


def is_first() -> bool:
    """Check whether this is the first rank, which writes files and prints."""
    return this_rank()[0] == 0


def wait_for_all() -> None:
    """Wait until every rank has come here."""
    if this_rank()[1] > 1:
        dist.barrier(group=_waiting_group())


@contextmanager
def first_before_others() -> Iterator[None]:
    """Run the `with` block on the first rank, then on the others, which find the files it wrote."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def gather(value: Any) -> list[Any]:
    """Return the value of every rank, in the order of ranks."""
    _, ranks = this_rank()
    if ranks == 1:
        return [value]
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, value, group=_waiting_group())
    return found


def first_alone(work: Callable[[], None]) -> None:
    """Run a function on the first rank only, while the others wait."""
    if is_first():
        work()
    wait_for_all()


@cache
def _waiting_group() -> Any:
    """Return a group with a long timeout; that of the training group is short, to detect a rank that hangs."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE)
