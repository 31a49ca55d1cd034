"""`lora-llava chat`: chat with a model in the terminal or on a web page."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lora_llava.commands.arguments import home, positive
from lora_llava.core.errors import UserError
from lora_llava.core.quiet import quieten

SUMMARY = "chat with a model in the terminal or on a web page"
EXAMPLES = (
    "lora-llava chat runs/demo_scienceqa_qlora --image cat.png",
    "lora-llava chat runs/demo_scienceqa_qlora --web",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=home, help="run directory, folder with a complete LLaVA, or Hub id")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="answer this one message and exit; default: read messages until Ctrl-D"
    )
    parser.add_argument(
        "--image",
        metavar="PATH",
        type=home,
        action="append",
        default=[],
        help="attach an image to the first message; repeat for several; default: none",
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt; default: the conversation template's")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="sampling temperature; default: 0, which is greedy"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling's share of probability")
    parser.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="most tokens of an answer")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of sampling; default: random")
    parser.add_argument(
        "--quantization",
        choices=["auto", "nf4", "none"],
        default="auto",
        help="how the language model's weights are stored; default: auto, as the run was trained",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="dtype of the computation; default: auto, as the run was trained",
    )
    parser.add_argument(
        "--template", metavar="NAME", help="conversation template, such as vicuna_v1; default: the model's own"
    )
    parser.add_argument("--web", action="store_true", help="serve a web page instead of chatting in the terminal")
    parser.add_argument(
        "--host", metavar="ADDRESS", help="address of the web page; default: 127.0.0.1, reached from this machine only"
    )
    parser.add_argument("--port", type=int, metavar="N", help="port of the web page, 0 for any free one; default: 7860")


def run(args: argparse.Namespace, console: Any) -> int:
    from lora_llava.inference.sampling import Sampling

    sampling = Sampling(args.temperature, args.top_p, args.max_new_tokens, args.seed)
    if args.web and (args.prompt is not None or args.image):
        raise UserError("--prompt and --image have no effect with --web; leave them out and use the page")
    if not args.web and (args.host is not None or args.port is not None):
        raise UserError("--host and --port have no effect without --web; add it, or leave them out")
    quieten()
    if args.web:
        return _serve(args, sampling, console)
    from lora_llava.inference.chat import Chat, answer_once, chat_on_terminal, open_images
    from lora_llava.inference.open_model import background_of

    for stream in (sys.stdin, sys.stdout, sys.stderr):  # print "?" for a letter that the terminal cannot encode
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # Open the images before the model, whose loading takes long.
    images = open_images(args.image, background_of(args.model)) if args.image else []
    speaker = _open(args)
    if args.prompt is not None:
        answer_once(speaker, args.prompt, images=images, sampling=sampling, system=args.system)
    else:
        chat_on_terminal(Chat(speaker, sampling, args.system, attached=images))
    return 0


def _serve(args: argparse.Namespace, sampling: Any, console: Any) -> int:
    from lora_llava.inference.web.page import import_gradio, serve
    from lora_llava.inference.web.web_address import check_address, is_loopback

    host = "127.0.0.1" if args.host is None else args.host
    import_gradio()  # before the model, whose loading takes long
    port = check_address(host, 7860 if args.port is None else args.port)
    if not is_loopback(host):
        print(
            f"warning: anyone who can reach {host} port {port} can use this model; the page has no password",
            file=sys.stderr,
        )
    serve(_open(args), host=host, port=port, sampling=sampling, system=args.system, console=console)
    return 0


def _open(args: argparse.Namespace) -> Any:
    if args.prompt is None and sys.stdin.isatty():
        print(f"loading {args.model}", file=sys.stderr)
    from lora_llava.inference.open_model import open_speaker

    return open_speaker(args.model, quantization=args.quantization, dtype=args.dtype, template=args.template)
