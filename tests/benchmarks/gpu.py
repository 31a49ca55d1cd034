"""Measure a GPU in twelve minutes: exactness, speed beside TRL's, answers, and plans beside measured memory."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import re
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lora_llava.benchmark.benchmark_sides import BenchmarkSettings
from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.core.quiet import quieten
from lora_llava.planning.memory import CUDA_CONTEXT, GIB
from lora_llava.runs.directory import versions, write_json
from tests.benchmarks.gpu_parts import (
    answering_speed,
    attention_errors,
    describe_gpu,
    rounding_noise,
    training_steps,
)

WORDS_OF_768 = 768 - 576 - 10
"""Words of a row that has 768 tokens with an image and the template."""
SMALL_CARD = 8 * GIB
"""The half of the plans that recomputes layers is made for a card of this size."""
_PATIENCE = 240.0
"""Seconds that a part may take."""
_LEAST = 20.0
"""Seconds without which a part is not started."""
_SEND = "send this file to the project: open an issue and attach {file}"


@dataclass(frozen=True)
class Part:
    """One measurement, in a process of its own.

    Attributes:
        name: Its name in the result.
        function: One of `gpu_parts`.
        argument: Whether the model is tiny, or the settings of a training run.
    """

    name: str
    function: Callable[..., dict[str, Any]]
    argument: Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=12.0, help="start no part after so long; default: 12")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, also on a CPU: tries the benchmark itself")


def run(args: argparse.Namespace) -> int:
    """Measure, part by part; the file is written after each, so that Ctrl-C loses one at most.

    Returns:
        0; 130 after Ctrl-C.

    Raises:
        UserError: Without a GPU.
    """
    if not torch.cuda.is_available() and not args.tiny:
        raise UserError("no CUDA GPU is here to measure; --tiny tries the benchmark itself on a CPU")
    console, end = Console(), time.monotonic() + 60 * args.minutes
    result: dict[str, Any] = {"benchmark": "gpu", "machine": {}, "versions": versions(), "parts": {}}
    found, parts, file = result["parts"], [], args.output
    try:
        here = result["machine"] = run_part(Part("machine", describe_gpu, args.tiny), _PATIENCE)
        file = file or Path(f"gpu_{re.sub('[^a-z0-9]+', '_', str(here.get('gpu') or 'cpu').lower())}.json")
        parts = list_parts(args.tiny, here.get("free_bytes"))
        with progress_bar(total=len(parts), desc="gpu", unit="part") as bar, contextlib.suppress(BrokenPipeError):
            for part in parts:
                bar.set_postfix_str(part.name)
                found[part.name] = run_within(part, end)
                write_json(file, result)
                bar.update()
    except KeyboardInterrupt:
        kept = f"{len(found)} of {len(parts)} parts are measured, in {file}" if found else "nothing was measured"
        console.print(f"stopped; {kept}", soft_wrap=True)
        return 130
    print_result(found, console)
    console.print(_SEND.format(file=file), soft_wrap=True)
    return 0


def list_parts(tiny: bool, free: int | None) -> list[Part]:
    """List the measurements, the most needed first.

    Args:
        tiny: Measure tiny models.
        free: Free bytes of the GPU, beside a process's CUDA context; None on a CPU.
    """
    shape, size = ("tiny_body", 2) if tiny else ("7b", 4)
    base = BenchmarkSettings("ours", shape, size, size, 1 if tiny else 4, 16, "adamw_torch", free, pool=50)
    speed = [
        Part(f"speed {name}{', Liger' * liger}", training_steps, replace(base, side=side, liger=liger))
        for name, side in (("ours", "ours"), ("TRL", "trl_random"))
        for liger in (False, True)
    ]
    first = [
        Part("attention", attention_errors, tiny),
        Part("rounding", rounding_noise, tiny),
        *speed,
        Part("answers", answering_speed, tiny),
    ]
    return first + _plans(replace(base, steps=2, words=WORDS_OF_768), free)[: 2 if tiny else None]


def _plans(base: BenchmarkSettings, whole: int | None) -> list[Part]:
    """List eight plans to measure: four settings, with all memory and with a small card's."""
    eight_bit = "adamw_torch" if whole is None else "paged_adamw_8bit"
    small = whole if whole is None else min(whole, SMALL_CARD - CUDA_CONTEXT)
    parts = []
    for memory, cap in (("8 GB", small), ("all GB", whole)):
        for r, optimizer, size, side in (
            (16, "adamw_torch", 1, "ours_cached"),
            (16, "adamw_torch", 4, "ours"),
            (64, eight_bit, 1, "ours"),
            (64, eight_bit, 4, "ours_cached"),
        ):
            size = min(size, base.batch_size)
            settings = replace(
                base, side=side, r=r, optimizer=optimizer, batch_size=size, micro_batch=size, cap_bytes=cap
            )
            parts.append(Part(f"plan {memory}, r {r}, {size} x 768", training_steps, settings))
    return parts


def run_within(part: Part, end: float) -> dict[str, Any]:
    """Run a part in what is left of the time; a training run that does not fit runs again with half the samples.

    Args:
        part: The part.
        end: When no part may start any more, on the monotonic clock.
    """
    while True:
        left = end - time.monotonic()
        if left < _LEAST:
            return {"skipped": "no time was left"}
        found = run_part(part, min(left + _LEAST, _PATIENCE))
        settings = part.argument
        halved = isinstance(settings, BenchmarkSettings) and settings.micro_batch > 1 and "out_of_memory" in found
        if not halved:
            return found
        part = replace(part, argument=replace(settings, micro_batch=settings.micro_batch // 2))


def run_part(part: Part, limit: float) -> dict[str, Any]:
    """Run a part in a new process, which is ended after a limit.

    Args:
        part: The part.
        limit: Seconds.

    Returns:
        Its result with `part_seconds`; or `error`: of the part, of a process that died, or of the limit.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_and_send, args=(sender, part))
    start = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: this process ends that one
    process.start()
    signal.signal(signal.SIGINT, before)
    sender.close()
    try:
        if not receiver.poll(limit):
            return {"error": f"it was ended after {limit:.0f} seconds"}
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        found = {"error": f"its process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()
    return found | {"part_seconds": round(time.monotonic() - start, 1)}


def _run_and_send(sender: Connection, part: Part) -> None:
    """Run a part and send its result, or the error of any kind that it raised."""
    quieten()
    warnings.simplefilter("ignore", FutureWarning)  # of use_liger_kernel, whose name TRL will change
    try:
        found = part.function(part.argument)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        found = {"error": text[:500], "traceback": traceback.format_exc()[-3000:]}
    sender.send(found)


def print_result(found: dict[str, Any], console: Console) -> None:
    """Print a line for each part."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, one in found.items():
        problem = next((f"{key}: {one[key]}" for key in ("error", "out_of_memory", "skipped") if key in one), None)
        table.add_row(name, problem.splitlines()[0][:200] if problem else _summary(name, one))
    console.print(table, markup=False)


def _summary(name: str, one: dict[str, Any]) -> str:
    if name.startswith("speed"):
        return f"{one['real_tokens_per_second']:,.0f} tokens/s, {one['micro_batch']} a pass"
    if name.startswith("plan"):
        reserved = one.get("planned_over_peak_reserved_bytes")
        text = f"plan over peak {one['planned_over_peak_memory_bytes']:.3f}"
        return text + (f", reserved {reserved:.3f}" if reserved else "")
    if name == "attention":
        kernels: dict[str, float | str] = {}
        for each in one["relative_errors"]:
            worst = max(each[key] for key in ("output", "query", "key", "value")) if "output" in each else "failed"
            before = kernels.get(each["kernel"], 0.0)
            kernels[each["kernel"]] = worst if isinstance(worst, str) or isinstance(before, str) else max(before, worst)
        return ", ".join(f"{k} {v if isinstance(v, str) else format(v, '.1e')}" for k, v in kernels.items())
    if name == "rounding":
        kinds = [kind for kind in ("packed", "padded", "liger") if kind in one]
        return "gradients: " + ", ".join(f"{kind} {one[kind]['gradients']:.2%}" for kind in kinds)
    return f"{one['batched']:.2f} a second in batches of {one['batch_size']}, {one['one_at_a_time']:.2f} one at a time"
