"""`lora-llava build-demo`: pre-train the demo's base model from a seed."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path, positive
from lora_llava.core.quiet import quieten

SUMMARY = "pre-train the demo's base model from a seed"
EXAMPLES = (
    "lora-llava build-demo --output demo_base",
    "lora-llava build-demo --output demo_base --llm-steps 10 --clip-steps 10",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=a_path,
        required=True,
        metavar="FOLDER",
        help="new folder, for llm/ and vision_tower/ (required)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of weights and data")
    parser.add_argument("--llm-steps", type=positive, metavar="N", help="steps of the language model; default: 4000")
    parser.add_argument("--clip-steps", type=positive, metavar="N", help="steps of the vision tower; default: 3000")


def run(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.demo.build import CLIP_STEPS, LLM_STEPS, build_demo

    seconds = build_demo(args.output, args.seed, args.llm_steps or LLM_STEPS, args.clip_steps or CLIP_STEPS)
    print(f"written to {args.output}: " + ", ".join(f"{name} in {value:.0f} s" for name, value in seconds.items()))
    return 0
