"""Run `lora-llava benchmark`, or one of the other benchmarks: `benchmark.py merge`, `check` and so on."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora_llava.commands.main import main as run_verb
from lora_llava.core.errors import UserError
from lora_llava.core.quiet import quieten

if __name__ != "__main__":  # in processes that a benchmark starts, which import this file first
    quieten()

BENCHMARKS = (
    "merge",
    "features",
    "check",
    "encoding",
    "concepts",
    "generation",
    "contexts",
    "synthesis",
    "gpu",
    "balance",
    "faults",
    "shared_images",
    "rivals",
    "simulate",
)
"""Modules of `tests.benchmarks`; only the chosen one is imported, also by the processes that it starts."""


def where() -> dict[str, Any]:
    """Describe the machine that the figures were measured on."""
    import psutil

    from lora_llava.runs.directory import machine, versions

    return {**machine(), "memory_bytes": psutil.virtual_memory().total, "versions": versions()}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        quieten()
        return run_verb("benchmark")
    try:
        return run_benchmark(sys.argv[1], sys.argv[2:])
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def run_benchmark(name: str, arguments: list[str]) -> int:
    """Run one of `BENCHMARKS`, print its result and write it."""
    quieten()
    module = importlib.import_module(f"tests.benchmarks.{name}")
    parser = argparse.ArgumentParser(prog=f"benchmark.py {name}", description=module.__doc__)
    module.add_arguments(parser)
    parser.add_argument("--output", type=Path, help="JSON file for the result; default: print only")
    args = parser.parse_args(arguments)
    found = module.run(args)
    if isinstance(found, int):  # of `gpu`, which writes its file part by part
        return found
    result = {"benchmark": name, "machine": where(), **found}
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
