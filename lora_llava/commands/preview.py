"""`lora-llava preview`: show samples exactly as the model is trained on them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_llava.commands.arguments import a_path, add_recipe, positive
from lora_llava.core.quiet import quieten

SUMMARY = "show training samples as an HTML page or in the terminal"
EXAMPLES = (
    "lora-llava preview my_images/recipe.yaml",
    "lora-llava preview recipes/demo_scienceqa_qlora.yaml --terminal --samples 3",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=a_path, metavar="FILE", help="HTML file to write; default: preview.html")
    parser.add_argument("--samples", type=positive, default=50, metavar="N", help="number of samples")
    parser.add_argument(
        "--split", choices=["train", "validation", "test"], default="train", help="split that the samples are from"
    )
    where.add_argument("--terminal", action="store_true", help="print the samples instead of writing a file")


def run(args: argparse.Namespace, console: Any) -> int:
    from lora_llava.recipe import find_recipe, load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    quieten()
    from lora_llava.prepare.sample_preview import preview

    output = None if args.terminal else args.output or Path("preview.html")
    name = str(find_recipe(args.recipe))
    preview(recipe, name=name, split=args.split, samples=args.samples, output=output, console=console)
    return 0
