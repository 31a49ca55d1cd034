"""`lora-llava plan`: estimate memory, steps and time of a recipe."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import add_recipe
from lora_llava.core.quiet import quieten

SUMMARY = "estimate memory, fitting GPUs, steps and time of a recipe"
EXAMPLES = ("lora-llava plan scienceqa_qlora.yaml", "lora-llava plan scienceqa_qlora.yaml training.memory_gb=12")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)


def run(args: argparse.Namespace, console: Any) -> int:
    from lora_llava.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    quieten()
    from lora_llava.planning.forecast import print_forecast

    print_forecast(recipe, console)
    return 0
