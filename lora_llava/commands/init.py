"""`lora-llava init`: write a recipe for a folder of images, questions and answers."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path, home
from lora_llava.core.quiet import quieten

SUMMARY = "write and check a recipe for a folder of your own images"
EXAMPLES = ("lora-llava init my_images", "lora-llava init my_images --example --model demo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=a_path, help="folder with images and a table or JSON file of questions and answers"
    )
    parser.add_argument(
        "--data", type=a_path, metavar="FILE", help="file with the questions; default: the only one in the folder"
    )
    parser.add_argument(
        "--model",
        type=home,
        metavar="MODEL",
        help="complete LLaVA to start from: a folder, a Hub id, or demo; default: the recipe's",
    )
    parser.add_argument(
        "--llm",
        type=home,
        metavar="MODEL",
        help="language model for a new LLaVA, instead of --model: a folder or Hub id; default: none",
    )
    parser.add_argument(
        "--vision-tower", type=home, metavar="MODEL", help="its vision tower; default: CLIP ViT-L/14 at 336 pixels"
    )
    parser.add_argument(
        "--recipe",
        type=home,
        metavar="NAME",
        help="shipped recipe to fill in: my_data_qlora.yaml, or my_data_8gb.yaml for a small GPU; default: "
        "my_data_qlora.yaml",
    )
    parser.add_argument("--example", action="store_true", help="create the folder first, with example images")
    parser.add_argument(
        "--follow-links", action="store_true", help="follow symbolic links in the folder, even to images outside it"
    )


def run(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.prepare.new_recipe import init

    _, report = init(
        args.folder,
        data=args.data,
        model=args.model,
        llm=args.llm,
        vision_tower=args.vision_tower,
        template=args.recipe,
        example=args.example,
        follow_links=args.follow_links,
        console=console,
    )
    return 1 if report.errors else 0
