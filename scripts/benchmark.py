"""Run `lora-llava benchmark`, or one of the other benchmarks: `benchmark.py merge`, `check` and so on."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora_llava.commands.main import main as run_verb
from lora_llava.core.errors import UserError
from tests.benchmarks import (
    check,
    concepts,
    contexts,
    dealing,
    encoding,
    faults,
    features,
    generation,
    gpu,
    merge,
    synthesis,
)

BENCHMARKS = {
    "merge": merge,
    "features": features,
    "check": check,
    "encoding": encoding,
    "concepts": concepts,
    "generation": generation,
    "contexts": contexts,
    "synthesis": synthesis,
    "gpu": gpu,
    "dealing": dealing,
    "faults": faults,
}


def where() -> dict[str, Any]:
    """Describe the machine that the figures were measured on."""
    import psutil

    from lora_llava.runs.directory import machine, versions

    return {**machine(), "memory_bytes": psutil.virtual_memory().total, "versions": versions()}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        return run_verb("benchmark")
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, help=str(module.__doc__))
        module.add_arguments(command)
        command.add_argument("--output", type=Path, help="JSON file for the result; default: print only")
    args = parser.parse_args()
    if args.benchmark == "gpu":  # it writes its file part by part
        try:
            return gpu.run(args)
        except UserError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    result = {"benchmark": args.benchmark, "machine": where(), **BENCHMARKS[args.benchmark].run(args)}
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
