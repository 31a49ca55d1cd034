"""`lora-llava report`: rebuild a run's HTML report."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import home
from lora_llava.core.quiet import quieten

SUMMARY = "rebuild a run's HTML report: curves, tables and answers"
EXAMPLES = ("lora-llava report runs/demo_scienceqa_qlora", "lora-llava report runs/my_images")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=home, help="directory of a finished run")


def run(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.evaluation.run_report import rebuild_report

    console.print(f"{rebuild_report(args.run)}: open it in a browser", soft_wrap=True)
    return 0
