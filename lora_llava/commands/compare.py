"""`lora-llava compare`: compare runs by paired tests on the same questions."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path
from lora_llava.core.quiet import quieten

SUMMARY = "compare runs by paired tests, with seeds averaged"
EXAMPLES = (
    "lora-llava compare runs/demo_scienceqa_qlora runs/other",
    "lora-llava compare runs/seed_0 runs/seed_1 --format latex --output table.tex",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=a_path, metavar="RUN", help="run directory or predictions file")
    parser.add_argument("--common", action="store_true", help="compare only questions that all runs answered")
    parser.add_argument("--published", action="store_true", help="print published ScienceQA scores below the table")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--format", choices=["terminal", "markdown", "latex"], default="terminal", help="format of the table"
    )
    form.add_argument("--json", action="store_true", help="print everything as JSON, unrounded")
    parser.add_argument("--output", type=a_path, metavar="FILE", help="file to write to; default: print")


def run(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.evaluation.compare.compare_files import find_predictions, read_runs
    from lora_llava.evaluation.compare.compare_view import as_json, render, terminal_view
    from lora_llava.evaluation.compare.comparison import compare_runs
    from lora_llava.recipe import load_recipe

    for path in args.runs:
        find_predictions(path)
    files = {run: run / "recipe.yaml" for run in args.runs}
    recipes = {run: load_recipe(file).model_dump(mode="json") for run, file in files.items() if file.is_file()}
    comparison = compare_runs(read_runs(args.runs, recipes), args.common)
    if args.format == "terminal" and not args.json and args.output is None:
        console.print(terminal_view(comparison, args.published))
        return 0
    text = as_json(comparison, args.published) if args.json else render(comparison, args.format, args.published)
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text, encoding="utf-8")
        console.print(f"written to {args.output}", soft_wrap=True)
    return 0
