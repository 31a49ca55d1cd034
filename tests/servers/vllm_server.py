"""A real vLLM on the loopback interface."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

FLAGS = ("--enforce-eager", "--max-num-seqs", "8", "--dtype", "float32", "--max-model-len", "512")
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
_STARTS_WITHIN = 600.0


def servers() -> Path:
    """Return the folder with the servers, or skip the test."""
    folder = os.environ.get("LORA_LLAVA_SERVERS")
    if not folder:
        pytest.skip("LORA_LLAVA_SERVERS is not set")
    return Path(folder)


@contextmanager
def vllm(folder: Path, *flags: str, lines: Sequence[str] = ("sh", "serving/serve.sh")) -> Iterator[str]:
    """Start vLLM by the script of a merged folder, and yield its URL.

    Args:
        folder: A folder of `lora-llava merge`.
        flags: Further flags.
        lines: The command in the folder that starts it.
    """
    path = f"{servers() / 'vllm/bin'}:{os.environ['PATH']}"
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"} | _ENVIRONMENT
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with (folder.parent / "vllm.log").open("wb") as log:
        process = subprocess.Popen(
            [*lines, "--host", "127.0.0.1", "--port", port, *FLAGS, *flags],
            cwd=folder,
            env=environment | {"PATH": path},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", folder.parent / "vllm.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + _STARTS_WITHIN
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1)
    raise AssertionError(log.read_text(errors="replace")[-3000:])
