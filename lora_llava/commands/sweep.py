"""`lora-llava sweep`: train a recipe with every combination of listed values, or search among them."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import home, positive
from lora_llava.core.quiet import quieten

SUMMARY = "train several values and seeds, and choose by validation"
EXAMPLES = (
    "lora-llava sweep recipe.yaml lora.r=8,32 --seeds 3",
    "lora-llava sweep recipe.yaml lora.r=4..64:log --trials 12",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=home, help="recipe file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=(),
        metavar="key.sub=value,value",
        help="values to try, or one value for all runs; commas inside quotes or brackets do not separate values; with "
        "--trials also a range, LOW..HIGH or LOW..HIGH:log",
    )
    parser.add_argument(
        "--trials",
        type=positive,
        metavar="N",
        help="search N settings with Optuna instead of training every combination; needs pip install "
        "'lora_llava[optuna]'",
    )
    parser.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="seeds of each setting, from the recipe's on"
    )
    parser.add_argument(
        "--by",
        choices=["loss", "score"],
        default="loss",
        help="what chooses the setting: the loss of the validation rows, or the score of answers to them",
    )
    parser.add_argument(
        "--output", type=home, metavar="FOLDER", help="folder of the runs; default: the recipe's output_dir with -sweep"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs and their steps; load no weights")


def run(args: argparse.Namespace, console: Any) -> int:
    from lora_llava.recipe import find_recipe, load_recipe

    load_recipe(args.recipe)  # before the heavy imports: report a typo immediately
    quieten()
    from lora_llava.training.sweep.grid import read_sweep
    from lora_llava.training.sweep.search import read_search
    from lora_llava.training.sweep.sweep_runs import run_search, run_sweep

    folder = find_recipe(args.recipe).parent
    if args.trials is None:
        sweep = read_sweep(args.recipe, args.overrides, args.seeds, args.output)
        run_sweep(sweep, folder, console, by=args.by, dry=args.dry_run)
    else:
        search = read_search(args.recipe, args.overrides, args.trials, args.seeds, args.output)
        run_search(search, folder, console, by=args.by, dry=args.dry_run)
    return 0
