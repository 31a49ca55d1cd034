"""`lora-llava import`: convert LLaVA's own checkpoint or LoRA folder."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path, home
from lora_llava.core.quiet import quieten

SUMMARY = "convert LLaVA's own checkpoint or LoRA folder to stock form"
EXAMPLES = (
    "lora-llava import llava-v1.5-7b --output llava-stock",
    "lora-llava import llava-v1.5-7b-lora --output runs/imported --llm lmsys/vicuna-7b-v1.5",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=a_path, help="a checkpoint or LoRA folder of github.com/haotian-liu/LLaVA")
    parser.add_argument("--output", type=a_path, required=True, help="the new folder")
    parser.add_argument("--llm", type=home, help="language model under a LoRA folder; default: the one it names")
    parser.add_argument("--vision-tower", type=home, help="CLIP tower, a folder or Hub id; default: the one it names")
    parser.add_argument("--base", type=home, help="complete stock LLaVA under a LoRA folder, instead of --llm")
    parser.add_argument("--template", default="vicuna_v1", help="conversation template it was trained with")


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
