"""Run commands in processes forked from one that has loaded the libraries, whose import takes eight seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lora_llava.commands.main import main

LIMIT_S = 600


def start_process(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a function in a forked process, whose environment is this one's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.libraries"])
    process = context.Process(target=_run, args=(dict(os.environ), target, arguments))
    process.start()
    return process


def _run(environment: dict[str, str], target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()  # the process that is forked has the variables of its own start
    os.environ.update(environment)
    target(*arguments)


def start(arguments: Sequence[str]) -> BaseProcess:
    """Start a verb."""
    return start_process(_verb, list(arguments))


def _verb(arguments: list[str]) -> None:
    sys.exit(main(None, arguments))


def run_ranks(
    script: Path, arguments: Sequence[str], count: int, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a script in processes that know of each other, as torchrun does.

    Args:
        script: The Python file.
        arguments: Its arguments.
        count: The number of processes.
        environment: Variables added to those of this process.

    Returns:
        The first exit code that is not 0, or 0, and what all processes printed.
    """
    with socket.socket() as free, TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        shared = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        ranks = [
            start_process(_rank, rank, count, shared, script, list(arguments), Path(folder)) for rank in range(count)
        ]
        try:
            wait_for(lambda: any(rank.exitcode for rank in ranks) or all(rank.exitcode == 0 for rank in ranks))
            code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        out, err = ("".join((Path(folder) / f"{name}{rank}").read_text() for rank in range(count)) for name in "oe")
    return subprocess.CompletedProcess([str(script), *arguments], code, out, err)


def _rank(rank: int, count: int, environment: dict[str, str], script: Path, arguments: list[str], log: Path) -> None:
    os.environ.update(environment)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    os.environ.update({"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)})
    for number, name in ((1, "o"), (2, "e")):
        os.dup2(os.open(log / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def kill(process: BaseProcess) -> None:
    """Kill a process like `kill -9`."""
    process.kill()
    process.join()
    assert process.exitcode == -9
    process.close()


def wait_for(reached: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + LIMIT_S
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.002)
