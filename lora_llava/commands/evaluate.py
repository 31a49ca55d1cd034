"""`lora-llava evaluate`: answer a recipe's test questions and score the answers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lora_llava.commands.arguments import a_path, add_letter_parser, add_overrides, add_published, home, positive
from lora_llava.commands.score import print_table
from lora_llava.core.errors import UserError
from lora_llava.core.quiet import quieten

SUMMARY = "answer a recipe's test questions with a model and score them"
EXAMPLES = (
    "lora-llava evaluate runs/demo_scienceqa_qlora",
    "lora-llava evaluate runs/demo_scienceqa_qlora --shuffle-images",
    "lora-llava evaluate runs/first --data test.csv --image-folder photos",
    "lora-llava evaluate runs/first --benchmark lmms:pope,gqa",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=home, help="run directory, folder with a complete LLaVA, or Hub id")
    add_overrides(parser)
    parser.add_argument(
        "--recipe", type=home, metavar="FILE", help="recipe whose data and evaluation to use; default: the run's"
    )
    parser.add_argument(
        "--data",
        type=a_path,
        metavar="FILE",
        help="ask all rows of this file (JSON, JSONL, CSV, TSV, Parquet) or of a folder with one; default: the "
        "recipe's held-out rows",
    )
    parser.add_argument(
        "--image-folder",
        type=a_path,
        metavar="FOLDER",
        help="root folder of the images of --data; default: images beside the file, or the file's folder",
    )
    parser.add_argument(
        "--benchmark",
        type=_benchmark,
        metavar="NAME",
        help="llava-bench: answer LLaVA-Bench's questions, to be scored by score llava-bench; lmms:TASK,TASK: tasks of "
        "lmms-eval, or YAML files of tasks, scored as it does (with --base-only: the column before); default: the "
        "recipe's questions",
    )
    parser.add_argument(
        "--questions", type=a_path, metavar="FILE", help="LLaVA-Bench's questions, JSONL; required for llava-bench"
    )
    parser.add_argument(
        "--images", type=a_path, metavar="FOLDER", help="LLaVA-Bench's images; required for llava-bench"
    )
    parser.add_argument(
        "--template", metavar="NAME", help="conversation template for LLaVA-Bench; default: the model's own"
    )
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="use only N questions, drawn by the recipe's seed (of each task of lmms-eval, the first N); default: all",
    )
    parser.add_argument("--shuffle-images", action="store_true", help="shuffle the images among the questions")
    parser.add_argument(
        "--method",
        choices=["generate", "loglik"],
        default="generate",
        help="generate an answer, or choose the option of highest log-likelihood",
    )
    parser.add_argument(
        "--prompt", metavar="NAME", help="recipe, lmms-eval or direct: prompt of ScienceQA questions; default: recipe"
    )
    add_letter_parser(parser)
    parser.add_argument("--direct", action="store_true", help="the same as --prompt direct: prompt for the letter only")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="sampling temperature; default: 0, which is greedy"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling's share of probability")
    parser.add_argument(
        "--bad-images",
        choices=["error", "wrong"],
        default="error",
        help="on an image that cannot be opened: stop with an error, or count its question as wrong and list it",
    )
    parser.add_argument(
        "--server", metavar="URL", help="query an OpenAI-compatible server, such as vLLM; default: load the model here"
    )
    parser.add_argument(
        "--server-model", metavar="NAME", help="model name on the server; default: the only model it serves"
    )
    parser.add_argument(
        "--concurrency", type=positive, metavar="N", help="concurrent requests to the server; default: 8"
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="timeout of one request; default: 120")
    parser.add_argument(
        "--base-only", action="store_true", help="evaluate the run's base, without its adapter and projector"
    )
    parser.add_argument(
        "--output", type=home, metavar="FOLDER", help="folder for predictions; default: the run directory"
    )
    add_published(parser)
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def _benchmark(text: str) -> str:
    """Check the name of a benchmark.

    Raises:
        argparse.ArgumentTypeError: For another one, or for lmms without tasks.
    """
    if text == "llava-bench" or (text.startswith(_LMMS) and _tasks(text)):
        return text
    raise argparse.ArgumentTypeError(f"{text} should be llava-bench, or lmms:TASK,TASK such as lmms:pope,gqa")


def _tasks(benchmark: str) -> list[str]:
    return [name.strip() for name in benchmark.removeprefix(_LMMS).split(",") if name.strip()]


def run(args: argparse.Namespace, console: Any) -> int:
    quieten()
    _refuse_without_effect(args)
    server = None
    if args.server:
        from lora_llava.inference.client.client import ChatServer

        timeout = 120.0 if args.timeout is None else args.timeout
        server = ChatServer(args.server, args.server_model, concurrency=args.concurrency or 8, timeout=timeout)
    if args.benchmark:
        ask = _answer_llava_bench if args.benchmark == "llava-bench" else _run_lmms
        return ask(args, server, console)
    from lora_llava.evaluation.asked.data_file import DataFile
    from lora_llava.evaluation.evaluate import EvaluationOptions, evaluate

    options = EvaluationOptions(
        method=args.method,
        prompt="direct" if args.direct else args.prompt or "recipe",
        temperature=args.temperature,
        top_p=args.top_p,
        shuffled=args.shuffle_images,
        base_only=args.base_only,
        bad_images=args.bad_images,
        parser=args.parser,
    )
    figures: dict[str, Any] = {}
    table = evaluate(
        args.model,
        options,
        recipe=args.recipe,
        overrides=args.overrides,
        data=DataFile(args.data, args.image_folder) if args.data else None,
        limit=args.limit,
        output=args.output,
        server=server,
        show_figures=figures.update,
    )
    same_questions = not (options.shuffled or options.base_only or args.data)
    rows = f"rows of {Path(args.data).name}" if args.data else "held-out rows"
    print_table(Path(args.model).name, table, args, console, figures, same_questions=same_questions, rows=rows)
    return 0


_LMMS = "lmms:"
_BENCHMARK_FLAGS = ("questions", "images", "template")
_SERVER_FLAGS = ("server_model", "concurrency", "timeout")
_TABLE_FLAGS = (
    "overrides",
    "recipe",
    "data",
    "image_folder",
    "limit",
    "shuffle_images",
    "prompt",
    "direct",
    "parser",
    "base_only",
    "published",
    "json",
)
"""Flags of an evaluation that prints a table."""


def _refuse_without_effect(args: argparse.Namespace) -> None:
    """Reject flags that would have no effect.

    Raises:
        UserError: Naming the first such flag.
    """

    def given(names: tuple[str, ...]) -> str | None:
        unset: tuple[Any, ...] = (None, (), [])
        values = {name: getattr(args, name) for name in names}
        first = next((name for name, value in values.items() if value is not False and value not in unset), None)
        return first and ("an override of a recipe" if first == "overrides" else f"--{first.replace('_', '-')}")

    is_lmms = args.benchmark is not None and args.benchmark.startswith(_LMMS)
    if args.benchmark != "llava-bench" and (flag := given(_BENCHMARK_FLAGS)):
        raise UserError(f"{flag} needs --benchmark llava-bench; add that, or leave {flag} out")
    if args.benchmark:
        taken = ("limit", "base_only", "json") if is_lmms else ()
        flag = (
            "--method loglik" if args.method != "generate" else given(tuple(f for f in _TABLE_FLAGS if f not in taken))
        )
        if is_lmms and not flag:  # the task says how answers are sampled
            defaults = {"temperature": 0.0, "top_p": 1.0, "bad_images": "error"}
            flag = next((f"--{n.replace('_', '-')}" for n in defaults if getattr(args, n) != defaults[n]), None)
        if flag:
            raise UserError(f"{flag} has no effect with --benchmark {args.benchmark}; leave it out")
    if is_lmms and args.base_only and args.server:
        raise UserError("--base-only needs a local model; leave it out with --server")
    if args.server is None and (flag := given(_SERVER_FLAGS)):
        raise UserError(f"{flag} needs --server; add it, or leave {flag} out")
    if args.image_folder and not args.data:
        raise UserError("--image-folder needs --data; add it, or leave --image-folder out")
    if args.direct and args.prompt not in (None, "direct"):
        raise UserError(f"--direct and --prompt {args.prompt} contradict each other; leave one out")
    if args.published and args.json:
        raise UserError("--published has no effect with --json; leave one out")


def _answer_llava_bench(args: argparse.Namespace, server: Any, console: Any) -> int:
    from dataclasses import replace

    from lora_llava.evaluation.judge.llava_bench_answers import answer_llava_bench
    from lora_llava.inference.sampling import Sampling

    for name in ("questions", "images"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing; --benchmark llava-bench needs it")
    if server is not None and server.model is None and not Path(args.model).is_dir():
        server = replace(server, model=args.model)
    file = answer_llava_bench(
        args.model,
        args.questions,
        args.images,
        output=args.output and Path(args.output),
        server=server,
        sampling=Sampling(args.temperature, args.top_p, 1024, 0),
        bad_images=args.bad_images,
        template=args.template,
    )
    console.print(f"{file}: score it with lora-llava score llava-bench", soft_wrap=True)
    return 0


def _run_lmms(args: argparse.Namespace, server: Any, console: Any) -> int:
    from lora_llava.evaluation.lmms.benchmark_table import COLUMNS, benchmark_notes, benchmark_rows
    from lora_llava.evaluation.lmms.lmms_benchmarks import run_lmms

    found = run_lmms(
        args.model,
        _tasks(args.benchmark),
        base_only=args.base_only,
        limit=args.limit,
        output=args.output and Path(args.output),
        server=server,
    )
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    from rich.table import Table

    view = Table()
    for place, column in enumerate(COLUMNS):
        view.add_column(column, justify="left" if place < 2 else "right", overflow="fold")
    for row in benchmark_rows(found):
        view.add_row(*row)
    console.print(view)
    for note in benchmark_notes(found):
        console.print(note, style="dim", soft_wrap=True)
    return 0
