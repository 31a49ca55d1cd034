"""`lora-llava generate-data`: generate conversations about images from captions and boxes."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import add_caps, add_recipe
from lora_llava.core.quiet import quieten

SUMMARY = "generate conversations about images from captions and boxes"
EXAMPLES = (
    "lora-llava generate-data recipes/demo_generate.yaml",
    "lora-llava generate-data recipes/generate_instruct.yaml --dry-run",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_caps(parser)
    parser.add_argument("--dry-run", action="store_true", help="print three prompts and a cost estimate; send nothing")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.recipe import load_generate_recipe
    from lora_llava.synthesis.generation import dry_run, generate

    recipe = load_generate_recipe(args.recipe, args.overrides)
    if args.dry_run:
        dry_run(recipe, console)
        return 0
    if args.json:  # only the summary goes to stdout
        console.stderr = True
    summary = generate(recipe, max_cost=args.max_cost, max_requests=args.max_requests, console=console)
    if args.json:
        import json

        print(json.dumps(summary, indent=2))
    else:
        from lora_llava.synthesis.summary_tables import print_summary

        print_summary(summary, recipe.output_dir, console)
    return 0 if summary["complete"] else 1
