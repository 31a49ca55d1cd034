"""`lora-llava benchmark`: measure training speed and memory on this machine, next to TRL's."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path, positive
from lora_llava.core.quiet import quieten

SUMMARY = "measure training speed and memory here, next to TRL's"
EXAMPLES = (
    "lora-llava benchmark --json benchmark.json",
    "lora-llava benchmark --shape tiny_body --steps 6 --json benchmark.json",
    "lora-llava benchmark --shape tiny_tiles --batch-size 4 --steps 5 --json benchmark.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        choices=["tiny", "tiny_body", "tiny_tiles", "7b", "13b"],
        default="tiny",
        help="model, with random weights; tiny_tiles is a LLaVA-1.6",
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="samples per optimizer step")
    parser.add_argument("--steps", type=positive, default=3, metavar="N", help="timed steps per run, after a warm-up")
    parser.add_argument(
        "--repeats", type=positive, default=2, metavar="N", help="runs of each side; the fastest counts"
    )
    parser.add_argument("--r", type=positive, default=16, metavar="N", help="LoRA rank")
    parser.add_argument("--cap-gb", type=float, metavar="GIB", help="GPU memory for torch; default: all of it")
    sides = ["ours", "ours_cached", "trl_random", "trl_grouped"]
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=sides,
        default=sides,
        metavar="SIDE",
        help=f"what to measure: {', '.join(sides)}; default: all",
    )
    parser.add_argument(
        "--json", type=a_path, metavar="FILE", help="write machine, versions and results there; default: print only"
    )


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
