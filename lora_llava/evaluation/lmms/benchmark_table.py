"""Scores of public benchmarks before and after training, beside those that LLaVA-1.5-7B was published with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_llava.pages.report_page import Table

Scores = Mapping[str, Mapping[str, Any]]
"""By benchmark: `questions`, and under `before` and `after` a score by metric, as lmms-eval computes it."""
COLUMNS = ("benchmark", "metric", "before", "after", "LLaVA-1.5-7B")
SOURCE = (
    "LLaVA-1.5-7B: docs/MODEL_ZOO.md of github.com/haotian-liu/LLaVA (arXiv 2310.03744), by LLaVA's own scripts, so "
    "prompts and scoring can differ from lmms-eval's"
)
"""Where the published scores are from."""


class Published(NamedTuple):
    """A published score of LLaVA-1.5-7B.

    Attributes:
        metric: The metric of lmms-eval's task that it is compared with.
        score: As it was published.
        unit: Factor from lmms-eval's value to the published unit.
        note: How it differs from lmms-eval's.
    """

    metric: str
    score: float
    unit: float = 100.0
    note: str = ""


PUBLISHED = {
    "gqa": Published("exact_match", 62.0),
    "scienceqa_img": Published("exact_match", 66.8),
    "textvqa_val": Published("exact_match", 58.2, note="published with OCR tokens in the prompt"),
    "pope": Published("pope_f1_score", 85.9, note="published as the mean of three subsets"),
    "mme": Published("mme_perception_score", 1510.7, unit=1.0),
    "mmbench_en_dev": Published("gpt_eval_score", 64.3, unit=1.0),
    "mmbench_cn_dev": Published("gpt_eval_score", 58.3, unit=1.0),
    "seedbench": Published("seed_all", 58.6),
    "llava_in_the_wild": Published("gpt_eval_llava_all", 65.4, unit=1.0),
    "mmvet": Published("gpt_eval_score", 31.1, unit=1.0),
}
"""By lmms-eval's task. VQAv2 (78.5) and VizWiz (50.0) are left out: published on test splits scored by servers only."""


def benchmark_rows(benchmarks: Scores) -> list[list[str]]:
    """Return the rows of the table, with a dash for a score that was not measured or published.

    Args:
        benchmarks: The scores.

    Returns:
        Texts for `COLUMNS`, a row for each metric. Metrics with a published score come first, in its unit.
    """
    rows = []
    for name, found in benchmarks.items():
        known = PUBLISHED.get(name)
        metrics = dict.fromkeys([*found.get("before", {}), *found.get("after", {})])
        first = [known.metric] if known and known.metric in metrics else []
        for metric in dict.fromkeys([*first, *metrics]):
            shown = known if known and metric == known.metric else None
            unit = shown.unit if shown else 1.0
            scores = [found.get(side, {}).get(metric) for side in ("before", "after")]
            title = name if metric == next(iter([*first, *metrics])) else ""
            rows.append([title, metric, *(_written(score, unit, shown) for score in scores)])
            rows[-1].append(f"{shown.score:g}" if shown else "–")
    return rows


def _written(score: float | None, unit: float, shown: Published | None) -> str:
    if score is None:
        return "–"
    return f"{score * unit:.1f}" if shown else f"{score:.4g}"


def benchmark_notes(benchmarks: Scores) -> list[str]:
    """Return sentences below the table: numbers of questions, and the source of published scores."""
    counts = ", ".join(f"{found['questions']:,} of {name}" for name, found in benchmarks.items())
    notes = [f"Questions: {counts}. Scored by lmms-eval."]
    compared = [name for name in benchmarks if name in PUBLISHED]
    if compared:
        differing = [f"{name}: {PUBLISHED[name].note}" for name in compared if PUBLISHED[name].note]
        notes.append(f"{'; '.join([SOURCE, *differing])}.")
    return notes


def public_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Return the table of public benchmarks for a page; none where a run has no such scores."""
    found = metrics.get("benchmarks")
    if not found:
        return []
    return [Table("Public benchmarks", COLUMNS, benchmark_rows(found), note=" ".join(benchmark_notes(found)))]


def numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of one task in lmms-eval's results: without standard errors, names and files.

    Args:
        results: Values by `METRIC,FILTER`.

    Returns:
        Values by metric; the filter is named in brackets unless it is `none`.
    """
    found: dict[str, float] = {}
    for key, value in results.items():
        metric, _, chain = key.partition(",")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and chain and not re.search(r"_stderr", metric):
            found[metric if chain == "none" else f"{metric} ({chain})"] = float(value)
    return found
