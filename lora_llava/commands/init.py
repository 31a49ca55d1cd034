"""`lora-llava init`: write a recipe for a folder of images, questions and answers."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path, home
from lora_llava.core.quiet import quieten

SUMMARY = "write a recipe for a folder of your own images and questions, and check it"
EXAMPLES = ("lora-llava init my_images", "lora-llava init my_images --example --model demo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=a_path, help="folder with your images and a table or JSON of questions")
    parser.add_argument("--data", type=a_path, help="the file of rows, where the folder has several")
    parser.add_argument("--model", type=home, help="complete LLaVA to start from: a folder, a Hub id, or demo")
    parser.add_argument(
        "--recipe",
        type=home,
        help="shipped recipe to fill in: my_data_qlora.yaml, or my_data_8gb.yaml for a small GPU",
    )
    parser.add_argument("--example", action="store_true", help="first make an example folder with drawn images")
    parser.add_argument(
        "--follow-links", action="store_true", help="read images behind links in the folder, also outside it"
    )


def run(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.prepare.new_recipe import init

    _, report = init(
        args.folder,
        data=args.data,
        model=args.model,
        template=args.recipe,
        example=args.example,
        follow_links=args.follow_links,
        console=console,
    )
    return 1 if report.errors else 0
