"""Compare answers in batches with answers one at a time, and log-likelihood with generation."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_llava.evaluation.evaluate import (
    EvaluationOptions,
    held_out_rows,
    load_evaluator,
    open_answerer,
    open_evaluation,
)
from lora_llava.evaluation.row_evaluation import evaluate_scienceqa
from lora_llava.inference.sampling import Sampling
from lora_llava.recipe import EvaluationSection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="finished run on ScienceQA, such as the demo's")
    parser.add_argument("--limit", type=int, help="number of questions; default: all")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load the weights once, run one untimed pass, and time passes that each encode their questions and images."""
    options = EvaluationOptions()
    opened = open_evaluation(args.run, options)
    settings = opened.recipe.evaluation or EvaluationSection()
    rows = held_out_rows(opened, options, args.limit)
    batched = load_evaluator(opened, settings.batch_size)
    sampling = Sampling(max_new_tokens=settings.max_new_tokens)

    def ask(asked: Any, options: EvaluationOptions) -> tuple[float, Any, list[Any]]:
        start = time.perf_counter()
        answerer = open_answerer(opened, options, asked, sampling)
        table, marked = evaluate_scienceqa(rows, answerer, predictions=None, description=options.method)
        return time.perf_counter() - start, table, marked

    ask(batched, options)
    many, table, together = ask(batched, options)
    one, _, alone = ask(replace(batched, batch_size=1), options)
    scoring, likely, scored = ask(batched, EvaluationOptions(method="loglik"))
    return {
        "run": Path(args.run).name,
        "questions": len(rows),
        "batch_size": settings.batch_size,
        "questions_per_second": {"batched": len(rows) / many, "one_at_a_time": len(rows) / one},
        "batched_over_one_at_a_time": one / many,
        "answers_that_differ": sum(a["text"] != b["text"] for a, b in zip(together, alone, strict=True)),
        "accuracy": {"generate": table["AVG"][0], "loglik": likely["AVG"][0]},
        "accuracy_with_image": {"generate": table["IMG"][0], "loglik": likely["IMG"][0]},
        "choices_that_differ": sum(a["prediction"] != b["prediction"] for a, b in zip(together, scored, strict=True)),
        "loglik_questions_per_second": len(rows) / scoring,
    }
