"""Run a verb in another process, to kill it."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess

from lora_llava.commands.main import main


def _run(arguments: list[str]) -> None:
    sys.exit(main(None, arguments))


def start(arguments: Sequence[str], preload: str) -> BaseProcess:
    """Start a verb in a process forked from one that has loaded the verb's module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_llava.commands.main", preload])
    process = context.Process(target=_run, args=(list(arguments),))
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    """Kill a process like `kill -9`."""
    process.kill()
    process.join()
    assert process.exitcode == -9
    process.close()


def wait_for(reached: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + 240
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.002)
