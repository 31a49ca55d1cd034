"""The verb that makes data: generate-data."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.cli_data import add_recipe, positive
from lora_llava.core.quiet import quieten

# Heavy imports stand inside the verbs, so that `--help` and usage errors answer at once.


def add_generate_data(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--max-cost", type=float, metavar="USD",
        help="stop before this run and earlier ones under a cap cost more, failed tries included",
    )  # fmt: skip
    parser.add_argument(
        "--max-requests", type=positive, metavar="N", help="stop this run after so many, further tries included"
    )
    parser.add_argument("--dry-run", action="store_true", help="print three prompts and an estimate, ask nobody")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run_generate_data(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.commands.generate_data import dry_run, generate
    from lora_llava.recipe import load_generate_recipe

    recipe = load_generate_recipe(args.recipe, args.overrides)
    if args.dry_run:
        dry_run(recipe, console)
        return 0
    if args.json:  # nothing but the summary on stdout
        console.stderr = True
    summary = generate(recipe, max_cost=args.max_cost, max_requests=args.max_requests, console=console)
    if args.json:
        import json

        print(json.dumps(summary, indent=2))
    else:
        from lora_llava.synthesis.printed_report import print_summary

        print_summary(summary, recipe.output_dir, console)
    return 0 if summary["complete"] else 1
