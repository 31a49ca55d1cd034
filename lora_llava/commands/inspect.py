"""`lora-llava inspect`: list the rows that gain nothing from their image, surprising answers and near-duplicates."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_llava.commands.arguments import home, positive
from lora_llava.core.quiet import quieten

SUMMARY = "list surprising answers, unneeded images and near-duplicates"
EXAMPLES = (
    "lora-llava inspect runs/my_images",
    "lora-llava inspect runs/my_images --data more.csv --image-folder more",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=home, help="directory of a finished run")
    parser.add_argument(
        "--data",
        type=home,
        metavar="FILE",
        help="rows to inspect, in any form that training reads; default: the run's training and held-out rows",
    )
    parser.add_argument(
        "--image-folder",
        type=home,
        metavar="FOLDER",
        help="root folder of the images of --data; default: images beside the file, or else the file's folder",
    )
    parser.add_argument(
        "--output",
        type=home,
        metavar="FOLDER",
        help="folder for inspect.csv and inspect.html; default: the run directory, or with --data its folder "
        "inspect_FILE",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="inspect only N rows, drawn by the recipe's seed; default: all"
    )


def run(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.evaluation.asked.data_file import DataFile
    from lora_llava.evaluation.inspection.inspect_files import write_inspection
    from lora_llava.evaluation.inspection.inspection import inspect_rows

    own = Path(args.run) / f"inspect_{DataFile(Path(args.data)).suffix()}" if args.data else Path(args.run)
    folder = Path(args.output) if args.output else own
    found, kept = inspect_rows(
        args.run, data=args.data, image_folder=args.image_folder, folder=folder, limit=args.limit
    )
    table, page = write_inspection(found, folder)
    kept.remove()
    _print_summary(found, console)
    console.print(f"{table}: the figures of every row", soft_wrap=True)
    console.print(f"{page}: open it in a browser", soft_wrap=True)
    return 0


def _print_summary(found: Any, console: Any) -> None:
    """Print counts by split, and what deserves a look first."""
    from rich import box
    from rich.table import Table

    table = Table(title="Rows that deserve a look", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("split", "rows", "surprising", "gain nothing", "not measured"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split in found.opened.splits:
        mine = [each for each in found.findings if each.split == split]
        counts = (
            len(mine),
            sum(each.is_surprising for each in mine),
            sum(each.gains_nothing for each in mine),
            sum(bool(each.problem) for each in mine),
        )
        table.add_row(split, *(f"{count:,}" for count in counts))
    console.print(table)
    leaks = sum(group.is_leak for group in found.groups)
    images = sum(len(group.images) for group in found.groups)
    groups = "1 group" if len(found.groups) == 1 else f"{len(found.groups):,} groups"
    console.print(
        f"{groups} of near-duplicate images with {images:,} of {found.images:,} images; across splits: {leaks:,}",
        soft_wrap=True,
    )
    for note in found.opened.notes:
        console.print(note, soft_wrap=True)
    for each in found.problems()[:3]:
        console.print(f"not measured: {found.rows[each.place].row.name}: {each.problem}", soft_wrap=True)
