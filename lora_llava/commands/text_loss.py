"""`lora-llava text-loss`: loss of plain text with and without the adapter."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_llava.commands.arguments import a_path, home
from lora_llava.core.quiet import quieten

SUMMARY = "loss of plain text with and without the adapter"
EXAMPLES = (
    "lora-llava text-loss runs/demo_scienceqa_qlora",
    "lora-llava text-loss runs/demo_scienceqa_qlora --text letters.txt",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=home, help="run directory, folder with a complete LLaVA, or Hub id")
    parser.add_argument(
        "--text", type=a_path, metavar="FILE", help="text file; default: a page of plain English from the package"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.inference.open_model import open_speaker
    from lora_llava.inference.text_loss import PLAIN_ENGLISH, measure_text_loss, read_plain_text

    file = Path(args.text or PLAIN_ENGLISH)
    text = read_plain_text(file)  # before the model, whose loading takes long
    speaker = open_speaker(args.model)
    found = measure_text_loss(speaker.model, speaker.processor.tokenizer, text)
    if args.json:
        print(json.dumps({"file": file.name, **asdict(found)}))
        return 0
    line = f"{file.name}, {found.tokens:,} tokens, loss in nats per token: "
    if found.base_loss is None:
        line += f"{found.loss:.4f}; the model has no adapter to compare with"
    else:
        change = found.loss - found.base_loss
        line += f"{found.base_loss:.4f} without the adapter, {found.loss:.4f} with it ({change:+.4f})"
    console.print(line, soft_wrap=True, highlight=False)
    return 0
