"""Real servers on the loopback interface: vLLM and llama.cpp's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from lora_llava.commands.main import main

ASKED = 120
"""Questions of an evaluation, of the demo's 480, to spare CPUs; docs/share_and_serve.md has figures of all."""
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
_LLAMA = """
import sys, time, xllamacpp as x
p = x.CommonParams()
p.hostnames = ["127.0.0.1"]; p.port = int(sys.argv[1]); p.model.path = sys.argv[2]
if sys.argv[3]: p.mmproj.path = sys.argv[3]
if sys.argv[4]: p.chat_template = open(sys.argv[4]).read()
p.n_ctx = 4096; p.n_parallel = 2; p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.use_jinja = p.offline = True; p.ui = p.warmup = p.kv_unified = False
server = x.Server(p)
while True: time.sleep(60)
"""
"""`llama-server -m MODEL --mmproj FILE --chat-template-file FILE -c 4096 -np 2 --jinja`."""


def servers() -> Path:
    """Return the folder with the servers, or skip the test."""
    folder = os.environ.get("LORA_LLAVA_SERVERS")
    if not folder:
        pytest.skip("LORA_LLAVA_SERVERS is not set")
    return Path(folder)


def evaluated(model: Path, output: Path, *flags: str) -> dict[str, str]:
    """Evaluate a model on `ASKED` questions, and return its answers by the questions' ids."""
    assert main("evaluate", [str(model), "--limit", str(ASKED), "--output", str(output), *flags]) == 0
    [file] = output.glob("predictions*.jsonl")
    found = texts(file)
    assert len(found) == ASKED
    return found


def texts(file: Path) -> dict[str, str]:
    """Return the answers of a predictions file by the questions' ids."""
    return {row["question_id"]: row["text"] for row in map(json.loads, file.read_text().splitlines())}


@contextmanager
def vllm(folder: Path, *flags: str) -> Iterator[str]:
    """Start vLLM by the script of a merged folder, and yield its URL.

    Args:
        folder: A folder of `lora-llava merge`.
        flags: Further flags.
    """
    port = free_port()
    path = f"{servers() / 'vllm/bin'}:{os.environ['PATH']}"
    lines = ["sh", "serving/serve.sh", "--host", "127.0.0.1", "--port", str(port), *FLAGS, *flags]
    with _started(lines, port, folder, {"PATH": path}, folder.parent / "vllm.log"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def llama(model: Path, mmproj: Path | None, template: Path | None = None) -> Iterator[tuple[str, int]]:
    """Start llama.cpp's server, and yield its URL and its process.

    Args:
        model: The GGUF file.
        mmproj: Its vision part; None for a server without images.
        template: Chat template in place of the file's.
    """
    port = free_port()
    python = servers() / "llama/bin/python"
    lines = [str(python), "-c", _LLAMA, str(port), str(model), str(mmproj or ""), str(template or "")]
    with _started(lines, port, model.parent, {}, model.parent / "llama.log") as process:
        yield f"http://127.0.0.1:{port}", process


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def _started(lines: Sequence[str], port: int, folder: Path, more: Mapping[str, str], log: Path) -> Iterator[int]:
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"} | _ENVIRONMENT | dict(more)
    with log.open("wb") as output:
        process = subprocess.Popen(
            lines, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield process.pid
    finally:
        if process.poll() is None:
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
            pass
        time.sleep(1)
    raise AssertionError(log.read_text(errors="replace")[-3000:])
