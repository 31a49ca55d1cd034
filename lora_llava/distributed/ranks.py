"""Several processes, one a GPU, that train together: which of them this is, who goes first, what all of them hold."""

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
"""How long ranks wait where one of them writes what all read; what dies is ended by the launcher."""


def this_rank() -> tuple[int, int]:
    """This process's number, and how many there are; where a launcher started several, they are joined here."""
    state = PartialState(cpu=not torch.cuda.is_available())
    return state.process_index, state.num_processes


def is_first() -> bool:
    """Whether this process writes and tells."""
    return this_rank()[0] == 0


def wait_for_all() -> None:
    """Go on when every rank is here."""
    if this_rank()[1] > 1:
        dist.barrier(group=_waiting_group())


@contextmanager
def first_before_others() -> Iterator[None]:
    """The first rank alone does what is inside, and then the others, who find what it wrote."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def gather(value: Any) -> list[Any]:
    """What every rank holds, in their order."""
    _, ranks = this_rank()
    if ranks == 1:
        return [value]
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, value, group=_waiting_group())
    return found


def first_alone(work: Callable[[], None]) -> None:
    """Let the first rank do it while the others wait."""
    if is_first():
        work()
    wait_for_all()


@cache
def _waiting_group() -> Any:
    """Apart from the one that trains, whose timeout is for what hangs."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE)
