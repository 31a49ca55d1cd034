"""`lora-llava check`: find errors in a recipe's data before training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_llava.commands.arguments import a_path, add_recipe
from lora_llava.core.quiet import quieten

SUMMARY = "read all data of a recipe and report what is wrong with it"
EXAMPLES = ("lora-llava check my_images/recipe.yaml", "lora-llava check my_images/recipe.yaml --json findings.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--json", type=a_path, metavar="FILE", help="write every finding to this file; default: print a summary only"
    )
    parser.add_argument(
        "--fix",
        action="store_true",
        help="write a cleaned copy next to each file of rows, and its name into the recipe",
    )


def run(args: argparse.Namespace, console: Any) -> int:
    from lora_llava.recipe import find_recipe, load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    quieten()
    from lora_llava.prepare.fixed_recipe import named_rows, use_fixed
    from lora_llava.prepare.row_check import check

    named = named_rows(recipe) if args.fix else []
    copies: dict[Path, Path] = {}
    report = check(recipe, json_file=args.json, fix=args.fix, copies=copies, console=console)
    if copies:
        use_fixed(named, find_recipe(args.recipe), args.overrides, copies, console)
    return 1 if report.errors else 0
