"""`lora-llava score`: score a file of answers."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path, add_caps, add_letter_parser, add_published, positive
from lora_llava.core.errors import UserError

SUMMARY = "score a file of answers"
EXAMPLES = ("lora-llava score scienceqa --help", "lora-llava score llava-bench --help")
_SCIENCEQA_EXAMPLE = """example:
  lora-llava score scienceqa --problems problems.json \\
    --splits pid_splits.json --answers answers.jsonl"""
_LLAVA_BENCH_EXAMPLE = """example:
  lora-llava score llava-bench --questions questions.jsonl \\
    --context context.jsonl --reference gpt4.jsonl \\
    --answers answers.jsonl --judge-url http://localhost:8000/v1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    summaries = {
        "scienceqa": "accuracy on ScienceQA, as LLaVA's evaluation computes it",
        "llava-bench": "scores on LLaVA-Bench, given by a judge such as GPT-4",
    }
    scienceqa, llava_bench = (
        benchmarks.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        for name, summary in summaries.items()
    )
    scienceqa.epilog, llava_bench.epilog = _SCIENCEQA_EXAMPLE, _LLAVA_BENCH_EXAMPLE
    _add_score_scienceqa(scienceqa)
    _add_score_llava_bench(llava_bench)


def _add_score_scienceqa(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", required=True, type=a_path, metavar="FILE", help="problems.json (required)")
    parser.add_argument("--splits", required=True, type=a_path, metavar="FILE", help="pid_splits.json (required)")
    parser.add_argument(
        "--answers", required=True, type=a_path, metavar="FILE", help="JSONL of question_id and text (required)"
    )
    parser.add_argument("--split", default="test", metavar="NAME", help="split that was answered")
    add_letter_parser(parser)
    add_published(parser)
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def _add_score_llava_bench(parser: argparse.ArgumentParser) -> None:
    files = {
        "--questions": "JSONL of question_id, image, category and text",
        "--context": "JSONL with descriptions of the images",
        "--reference": "JSONL of GPT-4's answers, question_id and text",
        "--answers": "JSONL of the answers to judge, question_id and text",
    }
    for flag, what in files.items():
        parser.add_argument(flag, required=True, type=a_path, metavar="FILE", help=f"{what} (required)")
    parser.add_argument(
        "--judge-url",
        metavar="URL",
        help="OpenAI-compatible server of the judge, with its key in OPENAI_API_KEY; required unless --dry-run",
    )
    parser.add_argument(
        "--judge-model", metavar="NAME", help="model name on the server; default: the only model it serves"
    )
    parser.add_argument(
        "--judge-temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help='sampling temperature of the judge, or the word "default" for the server\'s own; default: 0',
    )
    parser.add_argument(
        "--output", type=a_path, metavar="FOLDER", help="folder for the reviews; default: the folder of the answers"
    )
    parser.add_argument(
        "--prompts", type=a_path, metavar="FOLDER", help="folder with the judge's prompts; default: the shipped ones"
    )
    parser.add_argument(
        "--no-swap",
        action="store_true",
        help="judge each pair once, with the reference first, as LLaVA does; default: in both orders",
    )
    parser.add_argument(
        "--price-in", type=float, metavar="USD", help="price of a million input tokens; default: unknown"
    )
    parser.add_argument(
        "--price-out", type=float, metavar="USD", help="price of a million output tokens; default: unknown"
    )
    add_caps(parser)
    parser.add_argument("--concurrency", type=positive, default=8, metavar="N", help="concurrent requests")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="timeout of one request")
    parser.add_argument("--dry-run", action="store_true", help="print prompts and a cost estimate; send nothing")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _temperature(text: str) -> float | None:
    """Convert a temperature; return None for the server's own, because some models accept no other."""
    if text == "default":
        return None
    number = float(text)
    if not 0 <= number <= 2:
        raise argparse.ArgumentTypeError(f"{text} should be from 0 to 2, or default")
    return number


def run(args: argparse.Namespace, console: Any) -> int:
    return {"scienceqa": _score_scienceqa, "llava-bench": _score_llava_bench}[args.benchmark](args, console)


def _score_llava_bench(args: argparse.Namespace, console: Any) -> int:
    from lora_llava.evaluation.judge.judge_report import dry_run, print_report, score_llava_bench
    from lora_llava.evaluation.judge.llava_bench import read_cases
    from lora_llava.evaluation.judge.review import JudgeSettings
    from lora_llava.inference.client.budget import Budget
    from lora_llava.inference.client.client import ChatServer

    budget = Budget(args.price_in, args.price_out, args.max_cost, args.max_requests)
    settings = JudgeSettings(swap=not args.no_swap, temperature=args.judge_temperature)
    files = {name: getattr(args, name) for name in ("questions", "context", "reference", "answers")}
    cases = read_cases(*files.values())
    if args.dry_run:
        dry_run(cases, args.prompts, settings, budget, console)
        return 0
    if args.judge_url is None:
        raise UserError("--judge-url is missing; set it to an OpenAI-compatible server, as http://localhost:8000/v1")
    server = ChatServer(args.judge_url, args.judge_model, concurrency=args.concurrency, timeout=args.timeout)
    output = args.output or args.answers.parent
    if args.json:  # only the report goes to stdout
        console.stderr = True
    report = score_llava_bench(
        cases,
        server,
        files=files,
        output=output,
        prompts=args.prompts,
        settings=settings,
        budget=budget,
        console=console,
    )
    if args.json:
        import json

        print(json.dumps(report, indent=2))
    else:
        print_report(report, f"{args.answers.name}, judged by {report['judge']['model']}", output, console)
    return 0 if report["complete"] else 1


def _score_scienceqa(args: argparse.Namespace, console: Any) -> int:
    from lora_llava.evaluation.score_files import score_scienceqa_file

    table = score_scienceqa_file(args.problems, args.splits, args.answers, args.split, args.parser or "llava")
    print_table(args.answers.name, table, args, console, same_questions=args.split == "test")
    return 0


def print_table(
    name: str,
    table: dict[str, Any],
    args: argparse.Namespace,
    console: Any,
    figures: dict[str, Any] | None = None,
    *,
    same_questions: bool,
    rows: str = "held-out rows",
) -> None:
    """Print a table of scores with its figures, or its JSON with `--json`; add published scores if comparable."""
    if args.json:
        import json

        print(json.dumps(table, indent=2))
        return
    from lora_llava.evaluation.tables import tables_view

    console.print(tables_view("Answers" if "all" in table else "ScienceQA", {name: table}, figures, rows))
    _print_published(table, args.published, console, same_questions)


def _print_published(table: dict[str, Any], forced: bool, console: Any, same_questions: bool) -> None:
    """Print the published scores; unless forced, only if the same 4,241 questions were answered."""
    from lora_llava.evaluation.published import QUESTIONS, published_sources, published_table

    if "all" in table:
        if forced:
            console.print("--published has no effect: published scores exist for ScienceQA only")
        return
    count = table["AVG"][2]
    same_questions &= count == QUESTIONS
    if not forced and not same_questions:
        return
    console.print(published_table())
    if "parser" in table:
        console.print(
            f"Answer letters above were read by the {table['parser']} parser, those of published rows by LLaVA's rule"
        )
    console.print(f"Sources: {published_sources()}", style="dim", soft_wrap=True)
    if not same_questions:
        console.print(f"Not comparable: the table above covers {count:,} other questions", style="dim")
