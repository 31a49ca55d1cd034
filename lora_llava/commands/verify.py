"""`lora-llava verify`: check that a server gives the answers of a model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lora_llava.commands.arguments import home, positive
from lora_llava.core.errors import UserError
from lora_llava.core.quiet import quieten

SUMMARY = "compare the answers of a server with those of the model here"
EXAMPLES = (
    "lora-llava verify merged --server http://localhost:8000",
    "lora-llava verify runs/first --server http://localhost:8000 --server-model it",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=home, help="run directory, folder with a complete LLaVA, or Hub id")
    parser.add_argument("--server", required=True, metavar="URL", help="OpenAI-compatible server (required)")
    parser.add_argument(
        "--server-model", metavar="NAME", help="model name on the server; default: the only model it serves"
    )
    parser.add_argument(
        "--questions",
        type=positive,
        default=12,
        metavar="N",
        help="questions to ask, a third each with an image, without one, and of several turns: held-out rows of the "
        "model's recipe where they are here, else built-in ones",
    )
    parser.add_argument(
        "--max-differ",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="share of the answers that may differ, from 0 to 1; exit code 1 if more do",
    )
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="further field of every request, such as add_special_tokens=true; may be repeated",
    )
    parser.add_argument(
        "--quantization",
        choices=["auto", "nf4", "none"],
        default="auto",
        help="how the language model here is stored; default: auto, as the run was trained; none for a server that "
        "serves the adapter of a QLoRA run on the unquantised base",
    )
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="timeout of one request")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, with all answers")


def run(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.inference.client.client import ChatServer
    from lora_llava.publishing.verify.verify import print_verification, verify

    fields = dict(map(_field, args.field))
    server = ChatServer(args.server, args.server_model, timeout=args.timeout, retries=1, reconnect=0.0, fields=fields)
    report = verify(
        args.model, server, questions=args.questions, max_differ=args.max_differ, quantization=args.quantization
    )
    if args.json:
        print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        print_verification(args.model, report, console)
    return 0 if report.passed else 1


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text} should be from 0 to 1")
    return share


def _field(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        raise UserError(
            f"--field {text}: {value!r} is not JSON; write it as in --field add_special_tokens=true"
        ) from None
