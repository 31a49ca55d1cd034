"""`lora-llava finetune`: train a recipe, and evaluate the model before and after."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import Any

from lora_llava.commands.arguments import add_recipe, home
from lora_llava.core.quiet import quieten

SUMMARY = "train a recipe, and evaluate the model before and after"
EXAMPLES = (
    "lora-llava finetune recipes/demo_scienceqa_qlora.yaml",
    "lora-llava finetune my_images/recipe.yaml training.learning_rate=1e-4 --resume",
    "lora-llava finetune more/recipe.yaml --continue runs/first output_dir=runs/two",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would happen; load no weights")
    parser.add_argument("--resume", action="store_true", help="resume from the newest complete checkpoint")
    parser.add_argument(
        "--continue",
        dest="continued",
        type=home,
        metavar="RUN",
        help="train the adapter of a finished run on: sets model.start_from.run; base, lora, template and system text "
        "that the recipe leaves out are the run's; default: none",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run, finished or not")
    parser.add_argument(
        "--accept-changes",
        metavar="KEY,KEY",
        default="",
        help="with --resume: recipe keys that may differ from the interrupted run's, such as training.learning_rate; "
        "default: none",
    )


def run(args: argparse.Namespace, console: Any) -> int:
    from lora_llava.recipe import find_recipe, load_recipe

    continued = [f"model.start_from.run={json.dumps(args.continued)}"] if args.continued else []
    # Before the heavy imports: report a typo immediately.
    recipe = load_recipe(args.recipe, [*args.overrides, *continued])
    quieten()
    from lora_llava.training.finetune import dry_run, finetune

    folder = find_recipe(args.recipe).parent
    if args.dry_run:
        dry_run(recipe, folder, console)
        return 0
    accepted = [key.strip() for key in args.accept_changes.split(",") if key.strip()]
    finetune(recipe, folder, resume=args.resume, overwrite=args.overwrite, accept_changes=accepted, console=console)
    if recipe.stage == 2:
        console.print("next:")
        for command in next_commands(recipe.output_dir):
            console.print(f"  {command}", soft_wrap=True)
    return 0


def next_commands(run: str) -> list[str]:
    """List useful commands after a run."""
    merged = shlex.quote(f"{run}-merged")
    run = shlex.quote(run)
    return [
        f"lora-llava evaluate {run}",
        f"lora-llava inspect {run}",
        f"lora-llava chat {run}",
        f"lora-llava merge {run} --output {merged}",
        f"lora-llava push {merged} YOU/NAME --dry-run",
    ]
