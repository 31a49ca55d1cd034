"""Measure the balance of rows across ranks: tokens of the heaviest rank over the mean, on ScienceQA-like lengths."""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

IMAGE_TOKENS = 576
IMAGE_SHARE = 0.49
TEXT = {True: (310, 170), False: (340, 125)}
"""Mean and standard deviation of text tokens, with and without an image. In 444 real problems, the means are 299 and
333 and the deviations 186 and 125."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--samples", type=int, default=12726, help="ScienceQA's training rows")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each layout with unbalanced rows, where rank r gets `rows[r::ranks]`, and balanced; no model runs."""
    lengths = draw_lengths(args.samples)
    ordered = sorted(lengths)
    layouts = [(budget, None, accumulation) for budget in (2048, 4096, 8192) for accumulation in (1, 2)]
    batches = [(None, size, accumulation) for size, accumulation in ((4, 1), (16, 1), (4, 4))]
    return {
        "samples": len(lengths),
        "ranks": args.ranks,
        "mean_length": sum(lengths) / len(lengths),
        "p95_length": ordered[int(0.95 * len(ordered))],
        "longest": ordered[-1],
        "layouts": [_measure(lengths, args.ranks, *layout) for layout in layouts + batches],
    }


def draw_lengths(samples: int) -> list[int]:
    """Draw lengths with ScienceQA's mean, 95th percentile and share of images under the Llama tokenizer."""
    drawn = random.Random(0)

    def one(has_image: bool) -> int:
        mean, deviation = TEXT[has_image]
        text = int(drawn.gammavariate((mean / deviation) ** 2, deviation**2 / mean))
        return min(max(text, 80), 1100) + IMAGE_TOKENS * has_image

    return [one(drawn.random() < IMAGE_SHARE) for _ in range(samples)]


def _measure(
    lengths: list[int], ranks: int, budget: int | None, batch_size: int | None, accumulation: int
) -> dict[str, Any]:
    from lora_llava.data.packed_rows.packing import pack_samples
    from lora_llava.distributed.balance import distribute_rows
    from lora_llava.planning.row_order import batch_samples

    rows = pack_samples(lengths, budget) if budget is not None else batch_samples(lengths, batch_size or 1)
    start = time.perf_counter()
    dealt = distribute_rows(rows, lengths, ranks=ranks, accumulation=accumulation, max_tokens=budget)
    seconds = time.perf_counter() - start
    return {
        "max_tokens_per_row": budget,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "undealt": _unevenness(rows, lengths, ranks, accumulation),
        "dealt": _unevenness(dealt, lengths, ranks, accumulation),
        "seconds": seconds,
    }


def _unevenness(rows: list[list[int]], lengths: list[int], ranks: int, accumulation: int) -> dict[str, float]:
    from lora_llava.distributed.balance import rank_tokens

    size = ranks * accumulation
    shares = [rank_tokens(rows[start : start + size], lengths, ranks) for start in range(0, len(rows), size)]
    uneven = [max(share) / (sum(share) / ranks) for share in shares]
    slowest = sum(map(max, shares)) / (sum(map(sum, shares)) / ranks)
    full = uneven[:-1]
    return {
        "steps": len(uneven),
        "mean": sum(full) / len(full),
        "worst_full_step": max(full),
        "last_step": uneven[-1],
        "steps_over_1.03": sum(one > 1.03 for one in uneven),
        "epoch": slowest,
    }
