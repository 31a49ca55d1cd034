"""`lora-llava merge`: merge an adapter into its base, and verify the result."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path, positive
from lora_llava.core.quiet import quieten

SUMMARY = "merge a run into its base as one stock folder and verify it"
EXAMPLES = (
    "lora-llava merge runs/demo_scienceqa_qlora --output merged",
    "lora-llava merge runs/demo_scienceqa_qlora --output served --projector-only",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=a_path, help="run directory")
    parser.add_argument("--output", type=a_path, required=True, metavar="FOLDER", help="new folder (required)")
    parser.add_argument(
        "--base",
        choices=["bf16", "nf4"],
        default="bf16",
        help="merge into the base's weights as stored, or into their values after NF4 quantization",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="dtype of the new weights")
    parser.add_argument(
        "--projector-only",
        action="store_true",
        help="merge the projector, and any LoRA of the vision tower, into FOLDER/base, and keep the language model's "
        "LoRA as FOLDER/adapter, for servers that reject modules_to_save",
    )
    parser.add_argument(
        "--prompts",
        type=positive,
        default=4,
        metavar="N",
        help="verify on N prompts with an image and N without",
    )


def run(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.publishing.merge import merge

    merge(
        args.run,
        args.output,
        base=args.base,
        dtype=args.dtype,
        projector_only=args.projector_only,
        prompts=args.prompts,
        console=console,
    )
    return 0
