"""Count memory on a CUDA card that is not there: plans at full depth, TRL on the same rows, and fragmentation."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_llava.benchmark.benchmark_rows import SHAPES
from lora_llava.core.progress import progress_bar
from lora_llava.planning.memory import GIB
from tests.simulation.launch import simulate
from tests.simulation.settings import SETTINGS, TILED, Setting

COMPARED = [("7b", 16), ("7b", 64), ("13b", 16)]
"""Shapes and ranks that are counted beside TRL, on four samples of 768 tokens with an image each."""
FRAGMENTED = [SETTINGS[0], SETTINGS[4]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=["plans", "trl", "fragments"], action="append", help="default: all of them")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the tables and return them."""
    parts = {"plans": plans, "trl": beside_trl, "fragments": fragments}
    return {name: part() for name, part in parts.items() if not args.only or name in args.only}


def plans() -> list[dict[str, Any]]:
    """Plan and count every setting at full depth."""
    found = _measure([("depth", setting) for setting in [*SETTINGS, *TILED]])
    _print(
        "Plan and count at full depth, without CUDA's context",
        ("setting", "recomputed", "plan", "count", "plan / count"),
        [
            (
                each["name"],
                f"{each['recomputed']} of {each['layers']}" + (", offloaded" if each["offloaded"] else ""),
                _gib(each["planned_bytes"]),
                _gib(each["counted_bytes"]),
                f"{each['planned_over_counted']:.3f}",
            )
            for each in found
        ],
    )
    return found


def beside_trl() -> list[dict[str, Any]]:
    """Count a step of ours and of TRL on the same samples, with every layer recomputed but our last."""
    jobs: list[tuple[str, Setting]] = []
    for shape, r in COMPARED:
        layers = SHAPES[shape][2]
        step = Setting(f"{shape} r{r}", shape=shape, r=r, tokens=4 * 768, images=4, cached=False, recomputed=layers - 1)
        jobs += [("depth", step), ("depth", replace(step, cached=True)), ("trl", step)]
    sides = _measure(jobs)
    found = [
        {
            "name": ours["name"],
            "ours_bytes": ours["counted_bytes"],
            "ours_cached_bytes": cached["counted_bytes"],
            "trl_bytes": trl["counted_bytes"],
            "trl_over_ours": trl["counted_bytes"] / ours["counted_bytes"],
        }
        for ours, cached, trl in zip(sides[::3], sides[1::3], sides[2::3], strict=True)
    ]
    _print(
        "A step of 4 x 768 tokens, AdamW, NF4, all layers recomputed, without CUDA's context",
        ("model", "ours", "ours, cached features", "TRL", "TRL / ours"),
        [
            (
                each["name"],
                *(_gib(each[f"{side}_bytes"]) for side in ("ours", "ours_cached", "trl")),
                f"{each['trl_over_ours']:.2f}",
            )
            for each in found
        ],
    )
    return found


def fragments() -> list[dict[str, Any]]:
    """Replay rows of four lengths through the caching allocator."""
    found = _measure([("fragments", setting) for setting in FRAGMENTED])
    _print(
        "Allocated share of the memory that the driver gave, rows of four lengths; in brackets, when a card is full",
        ("setting", "allocations and frees", "fixed segments", "expandable segments"),
        [
            (each["name"], f"{each['events']:,}", *(_shares(each, kind) for kind in ("fixed", "expandable")))
            for each in found
        ],
    )
    return found


def _shares(found: dict[str, Any], kind: str) -> str:
    reserved, needed = (found[f"{kind}_allocated"] / found[f"{kind}_{part}"] for part in ("reserved", "needed"))
    return f"{reserved:.3f} ({needed:.3f})"


def _measure(jobs: list[tuple[str, Setting]]) -> list[dict[str, Any]]:
    with progress_bar(total=len(jobs), desc="simulation", unit="step") as bar:
        return simulate([{"kind": kind, "setting": asdict(setting)} for kind, setting in jobs], done=bar.update)


def _print(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    Console(stderr=True).print(table)  # standard output has the JSON


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
