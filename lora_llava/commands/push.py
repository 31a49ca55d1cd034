"""`lora-llava push`: upload a run or a merged folder to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path
from lora_llava.core.quiet import quieten

SUMMARY = "push a run or a merged folder to the Hub, with a model card"
EXAMPLES = (
    "lora-llava push merged YOU/demo-llava --dry-run",
    "lora-llava push merged YOU/demo-llava --public",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=a_path, help="run directory, or folder with a complete LLaVA")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="repository on the Hub; created if it does not exist")
    parser.add_argument("--public", action="store_true", help="make a new repository public; default: private")
    parser.add_argument(
        "--base-repo",
        metavar="OWNER/NAME",
        help="repository to push the run's local base to first; default: the base is not pushed",
    )
    parser.add_argument("--replace", action="store_true", help="replace another model in that repository")
    parser.add_argument(
        "--license",
        metavar="ID",
        help="licence in the card, by its Hugging Face identifier, such as apache-2.0; default: from base and data",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the files and the card; upload nothing")


def run(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.publishing.push import push

    push(
        args.model,
        args.repo_id,
        public=args.public,
        base_repo=args.base_repo,
        replace=args.replace,
        licence=args.license,
        dry_run=args.dry_run,
        console=console,
    )
    return 0
