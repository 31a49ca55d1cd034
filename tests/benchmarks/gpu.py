"""Measure on CUDA: memory under caps, planned and measured peaks, and speed against TRL, at 7B and 13B shape."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from lora_llava.benchmark.benchmark_sides import BenchmarkSettings
from lora_llava.benchmark.comparison_run import run_in_process
from lora_llava.planning.memory import CUDA_CONTEXT, GIB

WORDS_OF_768 = 768 - 576 - 10
"""Words of a row that has 768 tokens with an image and the template."""
EIGHT_BIT = "paged_adamw_8bit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=["tiny", "7b", "13b"], action="append", help="default: 7b and 13b")
    parser.add_argument("--steps", type=int, default=20)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure memory, planner and speed."""
    shapes = args.shape or ["7b", "13b"]
    return {
        "memory": [found for shape in shapes for found in memory(shape, args.steps)],
        "planner": [found for shape in shapes for found in planner(shape)],
        "speed": [found for shape in shapes for found in speed(shape)],
    }


def memory(shape: str, steps: int) -> list[dict[str, Any]]:
    """Run steps of 4 x 768 tokens with cached features under a small GPU's cap, and TRL without a cap."""
    cap = _cap({"7b": 7.2, "13b": 11.2}.get(shape))
    found = []
    for r, optimizer in ((16, "adamw_torch"), (64, EIGHT_BIT)):
        base = {"shape": shape, "batch_size": 4, "micro_batch": 4, "steps": steps, "r": r, "words": WORDS_OF_768}
        for side, limit in (("ours_cached", cap), ("trl_random", None)):
            settings = BenchmarkSettings(side=side, optimizer=_usable(optimizer), cap_bytes=limit, **base)
            found.append({"r": r, "cap_bytes": limit, **run_in_process(settings)})
    return found


def planner(shape: str) -> list[dict[str, Any]]:
    """Plan and measure a dozen settings; torch's measurement excludes the CUDA context."""
    found = []
    for r in (16, 64):
        for batch in (2, 4, 8):
            for side in ("ours", "ours_cached"):
                settings = BenchmarkSettings(
                    side=side,
                    shape=shape,
                    batch_size=batch,
                    micro_batch=batch,
                    steps=2,
                    r=r,
                    optimizer="adamw_torch",
                    cap_bytes=_cap(24.0 if shape == "7b" else 40.0),
                    words=WORDS_OF_768,
                )
                result = run_in_process(settings)
                if "planned_bytes" in result:
                    result["planned_over_measured"] = (
                        result["planned_bytes"] - (CUDA_CONTEXT if torch.cuda.is_available() else 0)
                    ) / result["peak_memory_bytes"]
                if result.get("peak_reserved_bytes"):
                    result["allocated_over_reserved"] = result["peak_memory_bytes"] / result["peak_reserved_bytes"]
                found.append({"r": r, "batch": batch, **result})
    return found


def speed(shape: str) -> list[dict[str, Any]]:
    """Real tokens a second at ScienceQA's lengths under the caps of common cards."""
    found = []
    for cap_gb in (8, 12, 16, 24):
        for side in ("ours", "ours_cached", "trl_random", "trl_grouped"):
            for micro in (8, 4, 2, 1):
                settings = BenchmarkSettings(
                    side=side,
                    shape=shape,
                    batch_size=8,
                    micro_batch=micro,
                    steps=6,
                    r=16,
                    optimizer="adamw_torch",
                    cap_bytes=_cap(cap_gb - 0.8),
                )
                result = run_in_process(settings)
                if "out_of_memory" not in result:
                    break
            found.append({"cap_gb": cap_gb, **result})
    return found


def _cap(gib: float | None) -> int | None:
    return int(gib * GIB) if gib is not None and torch.cuda.is_available() else None


def _usable(optimizer: str) -> str:
    return optimizer if torch.cuda.is_available() else "adamw_torch"
