"""`lora-llava benchmark`: training speed and memory on this machine, beside TRL's own way."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path, positive
from lora_llava.core.quiet import quieten

SUMMARY = "measure training speed and memory here, beside TRL's, on rows of ScienceQA's lengths"
EXAMPLES = (
    "lora-llava benchmark --json benchmark.json",
    "lora-llava benchmark --shape tiny_body --steps 6 --json benchmark.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=["tiny", "tiny_body", "7b", "13b"], default="tiny", help="random weights")
    parser.add_argument("--batch-size", type=positive, default=8, help="samples per optimizer step, on every side")
    parser.add_argument("--steps", type=positive, default=3, help="timed steps per run, after one untimed step")
    parser.add_argument("--repeats", type=positive, default=2, help="runs of each side; the fastest counts")
    parser.add_argument("--r", type=positive, default=16, help="LoRA rank")
    parser.add_argument("--cap-gb", type=float, help="GPU memory in GiB that torch may use")
    sides = ["ours", "ours_cached", "trl_random", "trl_grouped"]
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides, help="default: all")
    parser.add_argument("--json", type=a_path, metavar="FILE", help="file for machine, versions and results")


def run(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.benchmark.comparison_run import benchmark

    benchmark(
        shape=args.shape,
        batch_size=args.batch_size,
        steps=args.steps,
        repeats=args.repeats,
        r=args.r,
        cap_gb=args.cap_gb,
        sides=args.sides,
        output=args.json,
        console=console,
    )
    return 0
