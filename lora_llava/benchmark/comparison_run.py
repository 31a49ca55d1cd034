"""`lora-llava benchmark`: real tokens per second and peak memory of this package and of TRL, on one machine."""

from __future__ import annotations

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable

from lora_llava.benchmark.benchmark_rows import TILES
from lora_llava.benchmark.benchmark_sides import BenchmarkSettings, run_side
from lora_llava.core.device import is_out_of_memory
from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.core.quiet import quieten
from lora_llava.planning.memory import GIB
from lora_llava.runs.directory import machine, versions, write_json


def benchmark(
    *,
    shape: str,
    batch_size: int,
    steps: int,
    repeats: int,
    r: int,
    cap_gb: float | None,
    sides: list[str],
    output: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Run the sides in turn, several times, each run in a new process, and keep the fastest run of each side.

    Args:
        shape: One of `benchmark_rows.SHAPES`.
        batch_size: Samples per optimizer step, on every side.
        steps: Timed steps of a run.
        repeats: Runs of each side.
        r: Rank of the adapters.
        cap_gb: GPU memory in GiB for torch; None for all.
        sides: Some of `SIDES`.
        output: JSON file for the result.
        console: Prints the table.

    Returns:
        `machine`, `versions`, `settings` and `results`.

    Raises:
        UserError: For settings that this machine cannot run.
    """
    if cap_gb is not None and not torch.cuda.is_available():
        raise UserError(f"--cap-gb {cap_gb:g} has no effect, because this machine has no GPU; leave it out")
    if not shape.startswith("tiny") and not torch.cuda.is_available():
        raise UserError(f"--shape {shape} would take days without a GPU; use tiny, tiny_body or tiny_tiles")
    on_gpu = "paged_adamw_8bit" if r >= 64 else "adamw_torch_fused"
    optimizer = on_gpu if torch.cuda.is_available() else "adamw_torch"
    cap = None if cap_gb is None else int(cap_gb * GIB)
    settings = [BenchmarkSettings(side, shape, batch_size, batch_size, steps, r, optimizer, cap) for side in sides]
    best: dict[str, dict[str, Any]] = {}
    with progress_bar(total=repeats * len(settings), desc="benchmark", unit="run") as bar:
        for _ in range(repeats):
            for one in settings:
                bar.set_postfix_str(one.side)
                found = _smallest_that_fits(one)
                if one.side not in best or found.get("seconds", math.inf) < best[one.side].get("seconds", math.inf):
                    best[one.side] = found
                bar.update()
    result = {
        "machine": machine(),
        "versions": versions(),
        "settings": {
            "shape": shape,
            "batch_size": batch_size,
            "steps": steps,
            "repeats": repeats,
            "r": r,
            "cap_gb": cap_gb,
            "optimizer": optimizer,
        },
        "results": [best[side] for side in sides],
    }
    console.print(_table(result))
    if output is not None:
        write_json(output, result)
        console.print(f"written to {output}", soft_wrap=True)
    return result


def _smallest_that_fits(settings: BenchmarkSettings) -> dict[str, Any]:
    """Run a side with the largest forward pass that fits into memory; accumulation keeps the batch size."""
    for micro in (size for size in range(settings.micro_batch, 0, -1) if settings.batch_size % size == 0):
        found = run_in_process(replace(settings, micro_batch=micro))
        if "out_of_memory" not in found:
            break
    return found


def run_in_process(settings: BenchmarkSettings) -> dict[str, Any]:
    """Run one side in a new process, for its own peak memory; return `out_of_memory` if it does not fit."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=quieten) as pool:
        return pool.submit(run_or_full, settings).result()


def run_or_full(settings: BenchmarkSettings) -> dict[str, Any]:
    """Run one side in this process; return `name` and `out_of_memory` if it does not fit."""
    try:
        return run_side(settings)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"name": settings.side, "out_of_memory": str(error).splitlines()[0]}


def _table(result: dict[str, Any]) -> RichTable:
    settings = result["settings"]
    rows = "ScienceQA's lengths" + (" and images of mixed sizes" if settings["shape"] == TILES else "")
    table = RichTable(
        title=f"{settings['shape']} model, rows of {rows}, {settings['batch_size']} samples per step",
        title_justify="left",
    )
    for name in ("side", "real tokens/s", "ours is", "peak memory", "samples per pass", "layers recomputed"):
        table.add_column(name, justify="left" if name == "side" else "right")
    ours = next((row.get("real_tokens_per_second") for row in result["results"] if row["name"] == "ours"), None)
    for row in result["results"]:
        if "out_of_memory" in row:
            table.add_row(row["name"], "out of memory")
            continue
        rate = row["real_tokens_per_second"]
        table.add_row(
            row["name"],
            f"{rate:,.0f}",
            f"{ours / rate:.2f}x" if ours else "",
            f"{row['peak_memory_bytes'] / GIB:.2f} GiB",
            str(row["micro_batch"]),
            str(row["checkpointed_layers"]),
        )
    return table
