"""Compare answers in batches with answers one at a time, and log-likelihood with generation."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_llava.evaluation.ask import ask_scienceqa
from lora_llava.evaluation.evaluate import Way, held_out_rows, load_asked, open_answerer, open_evaluation
from lora_llava.inference.sampling import Sampling
from lora_llava.recipe import EvaluationSection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="finished run on ScienceQA, such as the demo's")
    parser.add_argument("--limit", type=int, help="number of questions; default: all")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load the weights once, run one untimed pass, and time passes that each encode their questions and images."""
    way = Way()
    opened = open_evaluation(args.run, way)
    settings = opened.recipe.evaluation or EvaluationSection()
    rows = held_out_rows(opened, way, args.limit)
    batched = load_asked(opened, settings.batch_size)
    sampling = Sampling(max_new_tokens=settings.max_new_tokens)

    def ask(asked: Any, how: Way) -> tuple[float, Any, list[Any]]:
        start = time.perf_counter()
        answerer = open_answerer(opened, how, asked, sampling)
        table, marked = ask_scienceqa(rows, answerer, predictions=None, description=how.method)
        return time.perf_counter() - start, table, marked

    ask(batched, way)
    many, table, together = ask(batched, way)
    one, _, alone = ask(replace(batched, batch_size=1), way)
    scoring, likely, scored = ask(batched, Way(method="loglik"))
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
