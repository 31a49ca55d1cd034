"""The verbs that ask models and mark answers: evaluate, score."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_llava.cli_data import positive
from lora_llava.quiet import quieten

# Heavy imports stand inside the verbs, so that `--help` and usage errors answer at once.


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run directory, a folder with a whole LLaVA, or a Hub id")
    parser.add_argument(
        "overrides", nargs="*", default=(), metavar="key.sub=value", help="replace values of the recipe"
    )
    parser.add_argument("--recipe", help="whose data and evaluation to use; default: the run's own")
    parser.add_argument("--limit", type=positive, help="ask only this many questions, drawn by the recipe's seed")
    parser.add_argument("--shuffle-images", action="store_true", help="exchange the pictures among the questions")
    parser.add_argument("--base-only", action="store_true", help="the run's base, without what was trained")
    parser.add_argument("--output", help="where predictions go; default: the run directory")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run_evaluate(args: argparse.Namespace, console: Any) -> int:
    quieten()
    from lora_llava.training.evaluate import evaluate

    table = evaluate(
        args.model, recipe=args.recipe, overrides=args.overrides, limit=args.limit, shuffled=args.shuffle_images,
        base_only=args.base_only, output=args.output,
    )  # fmt: skip
    _print_table(args.model, table, args.json, console)
    return 0


def add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=["scienceqa"])
    parser.add_argument("--problems", required=True, type=Path, help="problems.json")
    parser.add_argument("--splits", required=True, type=Path, help="pid_splits.json")
    parser.add_argument("--answers", required=True, type=Path, help="JSONL of question_id and text")
    parser.add_argument("--split", default="test", help="the split that was asked")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run_score(args: argparse.Namespace, console: Any) -> int:
    from lora_llava.evaluation.score_files import score_scienceqa_file

    table = score_scienceqa_file(args.problems, args.splits, args.answers, args.split)
    _print_table(args.answers.name, table, args.json, console)
    return 0


def _print_table(name: str, table: dict[str, Any], as_json: bool, console: Any) -> None:
    if as_json:
        import json

        print(json.dumps(table, indent=2))
        return
    from lora_llava.evaluation.report import tables_view

    console.print(tables_view("Answers" if "all" in table else "ScienceQA", {name: table}))
