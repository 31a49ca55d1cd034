"""`lora-llava export`: write a run or a merged folder in another format."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path
from lora_llava.core.quiet import quieten

SUMMARY = "write a merged folder or a run as GGUF for llama.cpp"
EXAMPLES = (
    "lora-llava export merged --format gguf --output gguf",
    "lora-llava export merged --format gguf --output gguf-q8 --quant q8_0",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=a_path, help="run directory, or the output of lora-llava merge")
    parser.add_argument("--format", choices=["gguf"], required=True, help="format to write (required)")
    parser.add_argument("--output", type=a_path, required=True, metavar="FOLDER", help="new folder (required)")
    parser.add_argument(
        "--quant",
        choices=["f16", "q8_0", "q4_k_m"],
        default="f16",
        help="type of the language model's matrices; q4_k_m needs pip install 'lora_llava[gguf]'",
    )
    parser.add_argument(
        "--class-token",
        choices=["none", "last", "first"],
        default="none",
        help="the tower's class token: left out, or written for a llama.cpp that puts it last (since 2025) or first",
    )
    parser.add_argument(
        "--square-images",
        action="store_true",
        help="export a model trained on crops although llama.cpp pads: you send square images only",
    )


def run(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.publishing.gguf.export_gguf import export_gguf

    export_gguf(
        args.run,
        args.output,
        quant=args.quant,
        class_token=args.class_token,
        square_images=args.square_images,
        console=console,
    )
    return 0
