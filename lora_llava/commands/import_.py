"""`lora-llava import`: convert LLaVA's own checkpoint or LoRA folder."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path, home
from lora_llava.core.quiet import quieten

SUMMARY = "convert LLaVA's own checkpoint or LoRA folder to stock form"
EXAMPLES = (
    "lora-llava import llava-v1.5-7b --output llava-stock",
    "lora-llava import llava-v1.5-7b-lora --output runs/imported",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=a_path, help="checkpoint or LoRA folder as the original LLaVA code writes it")
    parser.add_argument("--output", type=a_path, required=True, metavar="FOLDER", help="new folder (required)")
    parser.add_argument(
        "--llm",
        type=home,
        metavar="MODEL",
        help="language model that a LoRA folder was trained on, a folder or Hub id; default: the one it names",
    )
    parser.add_argument(
        "--vision-tower", type=home, metavar="MODEL", help="CLIP tower, a folder or Hub id; default: the one it names"
    )
    parser.add_argument(
        "--base",
        type=home,
        metavar="MODEL",
        help="complete stock LLaVA that a LoRA folder was trained on; default: assembled from --llm and --vision-tower",
    )
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="conversation template it was trained with; default: mistral for a llava_mistral, vicuna_v1 for others",
    )


def run(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.publishing.import_llava import import_llava

    import_llava(
        args.folder,
        args.output,
        llm=args.llm,
        vision_tower=args.vision_tower,
        base=args.base,
        template=args.template,
        console=console,
    )
    return 0
