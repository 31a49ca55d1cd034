"""`lora-llava score`: score a file of answers."""

from __future__ import annotations

import argparse
from typing import Any

from lora_llava.commands.arguments import a_path, add_caps, add_letter_parser, add_published, positive
from lora_llava.core.errors import UserError

SUMMARY = "score a file of answers"
EXAMPLES = (
    "lora-llava score scienceqa --problems problems.json --splits pid_splits.json --answers answers.jsonl",
    "lora-llava score llava-bench --questions questions.jsonl --context context.jsonl --reference gpt4.jsonl "
    "--answers answers.jsonl --judge-url http://localhost:8000/v1",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    _add_score_scienceqa(benchmarks.add_parser("scienceqa", help="by LLaVA's rule", allow_abbrev=False))
    _add_score_llava_bench(benchmarks.add_parser("llava-bench", help="by a judge, such as GPT-4", allow_abbrev=False))


def _add_score_scienceqa(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", required=True, type=a_path, help="problems.json")
    parser.add_argument("--splits", required=True, type=a_path, help="pid_splits.json")
    parser.add_argument("--answers", required=True, type=a_path, help="JSONL of question_id and text")
    parser.add_argument("--split", default="test", help="the split that was answered")
    add_letter_parser(parser)
    add_published(parser)
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def _add_score_llava_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", required=True, type=a_path, help="JSONL: question_id, image, category, text")
    parser.add_argument("--context", required=True, type=a_path, help="JSONL that describes the images")
    parser.add_argument("--reference", required=True, type=a_path, help="JSONL of GPT-4's answers: question_id, text")
    parser.add_argument(
        "--answers", required=True, type=a_path, help="JSONL of the answers to judge: question_id, text"
    )
    parser.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible server; its key: OPENAI_API_KEY")
    parser.add_argument("--judge-model", metavar="NAME", help="default: the only model of the server")
    parser.add_argument(
        "--judge-temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="a number, or default: the server's own",
    )
    parser.add_argument("--output", type=a_path, metavar="FOLDER", help="default: the folder of the answers")
    parser.add_argument("--prompts", type=a_path, metavar="FOLDER", help="judge prompts instead of the shipped ones")
    parser.add_argument("--no-swap", action="store_true", help="judge only with the reference first, as LLaVA does")
    parser.add_argument("--price-in", type=float, metavar="USD", help="price of a million input tokens")
    parser.add_argument("--price-out", type=float, metavar="USD", help="price of a million output tokens")
    add_caps(parser)
    parser.add_argument("--concurrency", type=positive, default=8, help="concurrent requests")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="timeout of one request")
    parser.add_argument("--dry-run", action="store_true", help="print prompts and a cost estimate; send nothing")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _temperature(text: str) -> float | None:
    """A temperature for argparse; None for the server's own, as some models take no other."""
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
    from lora_llava.inference.budget import Budget
    from lora_llava.inference.client import ChatServer

    budget = Budget(args.price_in, args.price_out, args.max_cost, args.max_requests)
    settings = JudgeSettings(swap=not args.no_swap, temperature=args.judge_temperature)
    files = {name: getattr(args, name) for name in ("questions", "context", "reference", "answers")}
    cases = read_cases(*files.values())
    if args.dry_run:
        dry_run(cases, args.prompts, settings, budget, console)
        return 0
    if args.judge_url is None:
        raise UserError("--judge-url is missing; name an OpenAI-compatible server such as http://localhost:8000/v1")
    server = ChatServer(args.judge_url, args.judge_model, concurrency=args.concurrency, timeout=args.timeout)
    output = args.output or args.answers.parent
    if args.json:  # nothing but the report on stdout
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
    name: str, table: dict[str, Any], args: argparse.Namespace, console: Any, *, same_questions: bool
) -> None:
    """Print a table of scores, or its JSON with `--json`; published scores below where they are comparable."""
    if args.json:
        import json

        print(json.dumps(table, indent=2))
        return
    from lora_llava.evaluation.tables import tables_view

    console.print(tables_view("Answers" if "all" in table else "ScienceQA", {name: table}))
    _print_published(table, args.published, console, same_questions)


def _print_published(table: dict[str, Any], forced: bool, console: Any, same_questions: bool) -> None:
    """Print the published scores: unless forced, only where the same 4,241 questions were answered."""
    from lora_llava.evaluation.published import QUESTIONS, published_sources, published_table

    if "all" in table:
        if forced:
            console.print("published scores are of ScienceQA; this table is not")
        return
    count = table["AVG"][2]
    same_questions &= count == QUESTIONS
    if not forced and not same_questions:
        return
    console.print(published_table())
    if "parser" in table:
        console.print(
            f"The letters above were read by the {table['parser']} parser, those of the published rows by LLaVA's rule"
        )
    console.print(f"Sources: {published_sources()}", style="dim", soft_wrap=True)
    if not same_questions:
        console.print(f"The table above covers {count:,} other questions: not comparable", style="dim")
