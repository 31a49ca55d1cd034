"""Run simulations in a process of their own, in which torch believes in a CUDA card."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
_GUARD = Path(__file__).with_name("guard.cpp")


class NotHereError(Exception):
    """This machine cannot simulate a card; the message is the reason."""


def build_guard() -> Path:
    """Compile the device guard once for this torch, about ten seconds, and return the library.

    Raises:
        NotHereError: Without g++, with a torch that has a guard of its own, or if it does not compile.
    """
    if torch.version.cuda is not None:
        raise NotHereError(f"torch {torch.__version__} is built for CUDA, whose own device guard is in the way")
    compiler = shutil.which("g++")
    if compiler is None:
        raise NotHereError("g++ is missing, which compiles the device guard")
    torch_folder = Path(torch.__file__).parent
    name = hashlib.sha256(torch.__version__.encode() + _GUARD.read_bytes()).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"lora_llava_fake_card_{os.getuid()}_{name}.so"
    if not library.exists():
        include = torch_folder / "include"
        made = library.with_suffix(f".{os.getpid()}")
        command = [
            compiler,
            "-O0",
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-I{include}",
            f"-I{include / 'torch/csrc/api/include'}",
            str(_GUARD),
            "-o",
            str(made),
            f"-L{torch_folder / 'lib'}",
            "-lc10",
            "-ltorch_cpu",
        ]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            reason = next((line for line in built.stderr.splitlines() if "error" in line), "no reason given")
            raise NotHereError(f"the device guard does not compile for torch {torch.__version__}: {reason}")
        made.replace(library)  # two processes may build it at once
    return library


def simulate(jobs: list[dict[str, Any]], done: Callable[[], object] = lambda: None) -> list[dict[str, Any]]:
    """Run jobs one after the other in one new process.

    Args:
        jobs: `kind`, one of `run_simulation.KINDS`, and the arguments of that function.
        done: Called once for each finished job.

    Returns:
        What each function returned.

    Raises:
        NotHereError: If this machine cannot simulate a card.
        RuntimeError: If the process fails, with the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="lora_llava_simulation_") as folder:
        found, output = Path(folder, "found.jsonl"), Path(folder, "output")
        found.touch()
        with output.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.simulation.run_simulation", json.dumps(jobs), str(found)],
                env=_environment(Path(folder)),
                cwd=folder,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            seen = 0
            try:
                while seen < len(jobs) and process.poll() is None:
                    time.sleep(0.2)
                    finished = found.read_text().count("\n")
                    for _ in range(finished - seen):
                        done()
                    seen = finished
                process.wait()
            finally:
                process.kill()
        if process.returncode:
            end = output.read_text()[-6000:]
            raise RuntimeError(f"the simulation failed with {process.returncode}:\n{end}")
        return [json.loads(line) for line in found.read_text().splitlines()]


def _environment(folder: Path) -> dict[str, str]:
    return os.environ | {
        "LD_PRELOAD": str(build_guard()),  # torch looks for hooks once, while it is imported
        "LD_LIBRARY_PATH": str(Path(torch.__file__).parent / "lib"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "LORA_LLAVA_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
