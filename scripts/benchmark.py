"""Speed and memory, measured: `python scripts/benchmark.py merge --shape 7b --output result.json`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.benchmarks import merge

BENCHMARKS = {"merge": merge}


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    import psutil
    import torch

    from lora_llava.training.run_directory import versions

    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu, "cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total, "gpu": gpu,
        "versions": versions(),
    }  # fmt: skip


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, help=str(module.__doc__))
        module.add_arguments(command)
        command.add_argument("--output", type=Path, help="file for the result, JSON")
    args = parser.parse_args()
    result = {"benchmark": args.benchmark, "machine": machine(), **BENCHMARKS[args.benchmark].run(args)}
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
