"""`lora-llava recipes`: list or copy the shipped recipes."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path

SUMMARY = "list or copy the shipped recipes"
EXAMPLES = ("lora-llava recipes", "lora-llava recipes --copy my_recipes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--copy", metavar="FOLDER", type=a_path, help="copy the shipped recipes there; default: list them"
    )
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of a recipe")
    parser.add_argument("--reference", action="store_true", help="print the reference of all keys, as Markdown")


def run(args: argparse.Namespace, console: Any) -> int:
    from lora_llava.recipe import (
        copy_recipes,
        json_schema,
        load_generate_recipe,
        load_recipe,
        shipped_generate_recipes,
        shipped_recipes,
    )

    if args.schema:
        print(json_schema(), end="")
        return 0
    if args.reference:
        from lora_llava.recipe.key_reference import key_reference

        print(key_reference(), end="")
        return 0
    if args.copy:
        written = copy_recipes(args.copy)
        print(f"{len(written)} files written to {args.copy}")
        return 0
    for path in shipped_recipes():
        recipe = load_recipe(path)
        model = recipe.model.start_from.llava or recipe.model.llm
        print(f"{path.name:38} stage {recipe.stage}  {model}")
    for path in shipped_generate_recipes():
        print(f"{path.name:38} data     {load_generate_recipe(path).teacher.backend}")
    return 0
