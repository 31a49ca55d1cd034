"""`lora-llava chat`: chat with a model, in the terminal or on a web page."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lora_llava.commands.arguments import home, positive
from lora_llava.core.errors import UserError
from lora_llava.core.quiet import quieten

SUMMARY = "chat with a model, in the terminal or on a web page"
EXAMPLES = (
    'lora-llava chat runs/demo_scienceqa_qlora --image image.png --prompt "What is shown?"',
    "lora-llava chat runs/demo_scienceqa_qlora --web",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=home, help="a run directory, a folder with a whole LLaVA, or a Hub id")
    parser.add_argument("--prompt", metavar="TEXT", help="print the answer to this alone, and leave")
    parser.add_argument(
        "--image",
        metavar="PATH",
        type=home,
        action="append",
        default=[],
        help="show an image with the first message; may be given several times",
    )
    parser.add_argument("--system", metavar="TEXT", help="system text in place of the template's own")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest that have this share")
    parser.add_argument("--max-new-tokens", type=positive, default=512, help="longest answer; default: 512")
    parser.add_argument("--seed", type=int, help="of what is drawn")
    parser.add_argument("--quantization", choices=["auto", "nf4", "none"], default="auto", help="default: the run's")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="default: the run's")
    parser.add_argument("--template", help="conversation template in place of the model's own, such as vicuna_v1")
    parser.add_argument("--web", action="store_true", help="serve a page in place of the terminal")
    parser.add_argument("--host", help="address the page is served on; default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, help="its port; default: 7860, 0 takes any free one")


def run(args: argparse.Namespace, console: Any) -> int:
    from lora_llava.inference.sampling import Sampling

    sampling = Sampling(args.temperature, args.top_p, args.max_new_tokens, args.seed)
    if args.web and (args.prompt is not None or args.image):
        raise UserError("--web takes images and messages on its page; leave out --prompt and --image")
    if not args.web and (args.host is not None or args.port is not None):
        raise UserError("--host and --port are the page's; add --web")
    quieten()
    if args.web:
        return _serve(args, sampling, console)
    from lora_llava.inference.chat import Chat, answer_once, chat_on_terminal, open_images
    from lora_llava.inference.open_model import background_of

    for stream in (sys.stdin, sys.stdout, sys.stderr):  # a letter that the terminal cannot write is no reason to end
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    images = (
        open_images(args.image, background_of(args.model)) if args.image else []
    )  # before the model, which takes its time
    speaker = _open(args)
    if args.prompt is not None:
        answer_once(speaker, args.prompt, images=images, sampling=sampling, system=args.system)
    else:
        chat_on_terminal(Chat(speaker, sampling, args.system, attached=images))
    return 0


def _serve(args: argparse.Namespace, sampling: Any, console: Any) -> int:
    from lora_llava.inference.web import check_address, import_gradio, is_loopback, serve

    host = "127.0.0.1" if args.host is None else args.host
    import_gradio()  # before the model, which takes its time
    port = check_address(host, 7860 if args.port is None else args.port)
    if not is_loopback(host):
        print(f"warning: whoever reaches {host} port {port} can talk to this model; no password asked", file=sys.stderr)
    serve(_open(args), host=host, port=port, sampling=sampling, system=args.system, console=console)
    return 0


def _open(args: argparse.Namespace) -> Any:
    if args.prompt is None and sys.stdin.isatty():
        print(f"opening {args.model}", file=sys.stderr)
    from lora_llava.inference.open_model import open_speaker

    return open_speaker(args.model, quantization=args.quantization, dtype=args.dtype, template=args.template)
