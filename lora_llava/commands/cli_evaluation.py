"""The verbs that ask models and mark answers: evaluate, score, compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_llava.commands.cli_data import a_path, home, positive
from lora_llava.core.quiet import quieten

# Heavy imports stand inside the verbs, so that `--help` and usage errors answer at once.


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=home, help="a run directory, a folder with a whole LLaVA, or a Hub id")
    parser.add_argument(
        "overrides", nargs="*", default=(), metavar="key.sub=value", help="replace values of the recipe"
    )
    parser.add_argument("--recipe", type=home, help="whose data and evaluation to use; default: the run's own")
    parser.add_argument(
        "--benchmark", choices=["llava-bench"], help="answer LLaVA-Bench's questions instead, for `lora-llava score "
        "llava-bench`",
    )  # fmt: skip
    parser.add_argument("--questions", type=a_path, help="LLaVA-Bench's questions, JSONL")
    parser.add_argument("--images", type=a_path, help="folder of LLaVA-Bench's pictures")
    parser.add_argument("--template", help="conversation template of a LLaVA-Bench model without one of its own")
    parser.add_argument("--limit", type=positive, help="ask only this many questions, drawn by the recipe's seed")
    parser.add_argument("--shuffle-images", action="store_true", help="exchange the pictures among the questions")
    parser.add_argument(
        "--method", choices=["generate", "loglik"], default="generate", help="let the model write its answer, or take "
        "the choice that it holds likeliest",
    )  # fmt: skip
    parser.add_argument("--prompt", help="how ScienceQA is asked: recipe, direct or lmms-eval")
    _add_parser(parser)
    parser.add_argument("--direct", action="store_true", help="ask for the letter alone; the same as --prompt direct")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument(
        "--bad-images", choices=["error", "wrong"], default="error", help="a picture that cannot be opened stops the "
        "evaluation, or its question counts as wrong and is listed",
    )  # fmt: skip
    parser.add_argument("--server", metavar="URL", help="ask an OpenAI-compatible server, such as vLLM or SGLang")
    parser.add_argument("--server-model", metavar="NAME", help="default: the only one that the server has")
    parser.add_argument("--concurrency", type=positive, help="questions at once to the server; default: 8")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for one answer of the server; default: 120")
    parser.add_argument("--base-only", action="store_true", help="the run's base, without what was trained")
    parser.add_argument("--output", type=home, help="where predictions go; default: the run directory")
    _add_published(parser)
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run_evaluate(args: argparse.Namespace, console: Any) -> int:
    quieten()
    _refuse_without_effect(args)
    server = None
    if args.server:
        from lora_llava.inference.client import ChatServer

        timeout = 120.0 if args.timeout is None else args.timeout
        server = ChatServer(args.server, args.server_model, concurrency=args.concurrency or 8, timeout=timeout)
    if args.benchmark:
        return _answer_llava_bench(args, server, console)
    from lora_llava.evaluation.evaluate import Way, evaluate

    way = Way(
        method=args.method, prompt="direct" if args.direct else args.prompt or "recipe", temperature=args.temperature,
        top_p=args.top_p, shuffled=args.shuffle_images, base_only=args.base_only, bad_images=args.bad_images,
        parser=args.parser,
    )  # fmt: skip
    table = evaluate(
        args.model, way, recipe=args.recipe, overrides=args.overrides, limit=args.limit, output=args.output,
        server=server,
    )  # fmt: skip
    _print_table(Path(args.model).name, table, args, console, same_questions=not (way.shuffled or way.base_only))
    return 0


_BENCHMARK_FLAGS = ("questions", "images", "template")
_SERVER_FLAGS = ("server_model", "concurrency", "timeout")
_TABLE_FLAGS = (
    "overrides", "recipe", "limit", "shuffle_images", "prompt", "direct", "parser", "base_only", "published", "json",
)  # fmt: skip
"""Of an evaluation that makes a table."""


def _refuse_without_effect(args: argparse.Namespace) -> None:
    """Refuse what would be passed over.

    Raises:
        UserError: Naming the first.
    """
    from lora_llava.core.errors import UserError

    def given(names: tuple[str, ...]) -> str | None:
        unsaid: tuple[Any, ...] = (None, (), [])
        values = {name: getattr(args, name) for name in names}
        said = next((name for name, value in values.items() if value is not False and value not in unsaid), None)
        return said and ("an override of a recipe" if said == "overrides" else f"--{said.replace('_', '-')}")

    if args.benchmark is None and (flag := given(_BENCHMARK_FLAGS)):
        raise UserError(f"{flag} is of --benchmark llava-bench; give that too, or leave it out")
    if args.benchmark:
        flag = "--method loglik" if args.method != "generate" else given(_TABLE_FLAGS)
        if flag:
            raise UserError(f"{flag} has no effect with --benchmark llava-bench; leave it out")
    if args.server is None and (flag := given(_SERVER_FLAGS)):
        raise UserError(f"{flag} is of a server; name it with --server, or leave it out")
    if args.direct and args.prompt not in (None, "direct"):
        raise UserError(f"--direct and --prompt {args.prompt} are two ways to ask; leave one out")
    if args.published and args.json:
        raise UserError("--published has no effect with --json; leave one out")


def _answer_llava_bench(args: argparse.Namespace, server: Any, console: Any) -> int:
    from dataclasses import replace

    from lora_llava.core.errors import UserError
    from lora_llava.evaluation.judge.llava_bench_answers import answer_llava_bench
    from lora_llava.inference.sampling import Sampling

    for name in ("questions", "images"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing; --benchmark llava-bench needs it")
    if server is not None and server.model is None and not Path(args.model).is_dir():
        server = replace(server, model=args.model)
    file = answer_llava_bench(
        args.model, args.questions, args.images, output=args.output and Path(args.output), server=server,
        sampling=Sampling(args.temperature, args.top_p, 1024, 0), bad_images=args.bad_images, template=args.template,
    )  # fmt: skip
    console.print(f"{file}: for lora-llava score llava-bench", soft_wrap=True)
    return 0


def add_score(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    _add_score_scienceqa(benchmarks.add_parser("scienceqa", help="by LLaVA's rule", allow_abbrev=False))
    _add_score_llava_bench(benchmarks.add_parser("llava-bench", help="by a judge, such as GPT-4", allow_abbrev=False))


def _add_score_scienceqa(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", required=True, type=a_path, help="problems.json")
    parser.add_argument("--splits", required=True, type=a_path, help="pid_splits.json")
    parser.add_argument("--answers", required=True, type=a_path, help="JSONL of question_id and text")
    parser.add_argument("--split", default="test", help="the split that was asked")
    _add_parser(parser)
    _add_published(parser)
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def _add_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parser", choices=["llava", "lenient"], help="how ScienceQA's letters are read: by LLaVA's rule, or also b, "
        "(B), **B**, \"answer: B\" and the choice's text; default: the recipe's, else llava",
    )  # fmt: skip


def _add_published(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--published", action="store_true", help="put published ScienceQA figures below, which is done anyway when "
        "all 4,241 test questions were asked",
    )  # fmt: skip


def _add_score_llava_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", required=True, type=a_path, help="JSONL: question_id, image, category, text")
    parser.add_argument("--context", required=True, type=a_path, help="JSONL of what is known of the pictures")
    parser.add_argument("--reference", required=True, type=a_path, help="JSONL of GPT-4's answers: question_id, text")
    parser.add_argument(
        "--answers", required=True, type=a_path, help="JSONL of the answers to judge: question_id, text"
    )
    parser.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible server; its key: OPENAI_API_KEY")
    parser.add_argument("--judge-model", metavar="NAME", help="default: the only one that the server has")
    parser.add_argument(
        "--judge-temperature", type=_temperature, default=0.0, metavar="T", help="a number, or default: the server's"
    )
    parser.add_argument("--output", type=a_path, metavar="FOLDER", help="default: where the answers are")
    parser.add_argument("--prompts", type=a_path, metavar="FOLDER", help="the judge's prompts in place of ours")
    parser.add_argument("--no-swap", action="store_true", help="only with the reference first, as LLaVA does")
    parser.add_argument("--price-in", type=float, metavar="USD", help="the judge's, for a million tokens to it")
    parser.add_argument("--price-out", type=float, metavar="USD", help="the same for tokens from it")
    parser.add_argument(
        "--max-cost", type=float, metavar="USD",
        help="stop before this run and earlier ones under a cap cost more, failed tries included",
    )  # fmt: skip
    parser.add_argument(
        "--max-requests", type=positive, metavar="N", help="stop this run after so many, further tries included"
    )
    parser.add_argument("--concurrency", type=positive, default=8, help="requests at once")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="for one answer")
    parser.add_argument("--dry-run", action="store_true", help="print prompts and an estimate of the cost, ask nobody")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _temperature(text: str) -> float | None:
    """A temperature for argparse; None for the server's own, as some models take no other."""
    if text == "default":
        return None
    number = float(text)
    if not 0 <= number <= 2:
        raise argparse.ArgumentTypeError(f"{text} should be from 0 to 2, or default")
    return number


def run_score(args: argparse.Namespace, console: Any) -> int:
    return {"scienceqa": _score_scienceqa, "llava-bench": _score_llava_bench}[args.benchmark](args, console)


def _score_llava_bench(args: argparse.Namespace, console: Any) -> int:
    from lora_llava.core.errors import UserError
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
        cases, server, files=files, output=output, prompts=args.prompts, settings=settings, budget=budget,
        console=console,
    )  # fmt: skip
    if args.json:
        import json

        print(json.dumps(report, indent=2))
    else:
        print_report(report, f"{args.answers.name}, judged by {report['judge']['model']}", output, console)
    return 0 if report["complete"] else 1


def _score_scienceqa(args: argparse.Namespace, console: Any) -> int:
    from lora_llava.evaluation.score_files import score_scienceqa_file

    table = score_scienceqa_file(args.problems, args.splits, args.answers, args.split, args.parser or "llava")
    _print_table(args.answers.name, table, args, console, same_questions=args.split == "test")
    return 0


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=a_path, metavar="RUN", help="a run directory or a predictions file")
    parser.add_argument("--common", action="store_true", help="compare only the questions that all runs have")
    parser.add_argument("--published", action="store_true", help="put published ScienceQA figures below")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--format", choices=["terminal", "markdown", "latex"], default="terminal")
    form.add_argument("--json", action="store_true", help="everything, unrounded, as JSON")
    parser.add_argument("--output", type=a_path, metavar="FILE", help="write there instead of printing")


def run_compare(args: argparse.Namespace, console: Any) -> int:
    from lora_llava.evaluation.compare.compare_files import read_runs
    from lora_llava.evaluation.compare.compare_view import as_json, render, terminal_view
    from lora_llava.evaluation.compare.comparison import compare_runs
    from lora_llava.recipe import load_recipe

    files = {run: run / "recipe.yaml" for run in args.runs}
    recipes = {run: load_recipe(file).model_dump(mode="json") for run, file in files.items() if file.is_file()}
    comparison = compare_runs(read_runs(args.runs, recipes), args.common)
    if args.format == "terminal" and not args.json and args.output is None:
        console.print(terminal_view(comparison, args.published))
        return 0
    text = as_json(comparison, args.published) if args.json else render(comparison, args.format, args.published)
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text, encoding="utf-8")
        console.print(f"written to {args.output}", soft_wrap=True)
    return 0


def _print_table(
    name: str, table: dict[str, Any], args: argparse.Namespace, console: Any, *, same_questions: bool
) -> None:  # fmt: skip
    if args.json:
        import json

        print(json.dumps(table, indent=2))
        return
    from lora_llava.evaluation.tables import tables_view

    console.print(tables_view("Answers" if "all" in table else "ScienceQA", {name: table}))
    _print_published(table, args.published, console, same_questions)


def _print_published(table: dict[str, Any], forced: bool, console: Any, same_questions: bool) -> None:
    """Put the published rows below: without being asked to, only where all of the same questions were answered."""
    from lora_llava.evaluation.published import QUESTIONS, published_sources, published_table

    if "all" in table:
        if forced:
            console.print("the published rows are ScienceQA's; this is another table")
        return
    count = table["AVG"][2]
    same_questions &= count == QUESTIONS
    if not forced and not same_questions:
        return
    console.print(published_table())
    if "parser" in table:
        console.print(f"The {table['parser']} parser read the letters above, LLaVA's rule those of the published rows")
    console.print(f"Sources: {published_sources()}", style="dim", soft_wrap=True)
    if not same_questions:
        console.print(f"The table above is of {count:,} questions, not of theirs: not to be compared", style="dim")


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=home, help="a finished run")


def run_report(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.evaluation.run_report import rebuild_report

    console.print(f"{rebuild_report(args.run)}: open it in a browser", soft_wrap=True)
    return 0
