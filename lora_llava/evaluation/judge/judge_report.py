"""`lora-llava score llava-bench`: have answers judged and report relative scores."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_llava.core.errors import StoppedError, UserError
from lora_llava.core.storage import atomic_file
from lora_llava.evaluation.answer_metrics import DASH
from lora_llava.evaluation.judge.judge_ledger import open_judge_ledger
from lora_llava.evaluation.judge.judging import Judge, Verdict
from lora_llava.evaluation.judge.review import (
    ATTEMPTS,
    CATEGORIES,
    ORDERS,
    JudgeCase,
    JudgeSettings,
    judge_request,
    load_prompts,
    prompt_hashes,
)
from lora_llava.inference.client.budget import Budget, estimate_tokens
from lora_llava.inference.client.chat_request import ChatRequest
from lora_llava.inference.client.client import ChatServer, find_model

REPORT = "llava_bench.json"
STATUSES = ("scored", "unparsed", "failed", "not asked")
_RESAMPLES = 2_000
_LISTED = 20
"""Most ids that are printed; the report has all."""


def relative_score(answers: Sequence[float], references: Sequence[float]) -> float | None:
    """Return the mean score of the answers in percent of that of the references (llava/eval/summarize_gpt_review.py).

    Args:
        answers: Scores of the answers, one per question.
        references: Scores of the references, one per question.

    Returns:
        The percentage; None if the references' scores sum to 0.
    """
    return 100 * sum(answers) / sum(references) if sum(references) else None


def ratio_interval(answers: Sequence[float], references: Sequence[float]) -> tuple[float, float] | None:
    """Compute the 95% interval of the relative score by a percentile bootstrap (scipy.stats.bootstrap, paired).

    Questions are resampled, each with both its scores.

    Args:
        answers: Scores of the answers, one per question.
        references: Scores of the references, one per question.

    Returns:
        The lower and the upper end in percent. None for fewer than two questions, and if an end is not finite because
        the references of too many resamples sum to 0.
    """
    import numpy as np
    from scipy.stats import bootstrap

    from lora_llava.evaluation.parsing.intervals import LEVEL

    if len(answers) < 2:
        return None

    def statistic(ours: Any, theirs: Any, axis: int = -1) -> Any:
        return 100 * ours.sum(axis=axis) / theirs.sum(axis=axis)

    samples = (np.asarray(answers, dtype=float), np.asarray(references, dtype=float))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = bootstrap(
            samples,
            statistic,
            paired=True,
            confidence_level=LEVEL,
            n_resamples=_RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def tabulate(verdicts: Sequence[Verdict]) -> dict[str, dict[str, Any]]:
    """Average the scores over each category and over all; questions without a score are counted but not averaged.

    Args:
        verdicts: Verdicts on all questions.

    Returns:
        By category, `all` last: the number of questions by status, the mean scores `answer` and `reference`, and
        `relative` in percent with its 95% `interval`. Scores are None if no question is scored; see `ratio_interval`.
    """
    table: dict[str, dict[str, Any]] = {}
    for category in (*CATEGORIES, "all"):
        mine = [verdict for verdict in verdicts if category in (verdict.case.category, "all")]
        if not mine:
            continue
        scored = [(item.answer, item.reference) for item in mine if item.answer is not None]
        answers = [answer for answer, _ in scored if answer is not None]
        references = [reference for _, reference in scored if reference is not None]
        relative = relative_score(answers, references)
        interval = ratio_interval(answers, references)
        table[category] = {
            "questions": len(mine),
            **{status: sum(verdict.status == status for verdict in mine) for status in STATUSES},
            "answer": round(sum(answers) / len(answers), 3) if answers else None,
            "reference": round(sum(references) / len(references), 3) if references else None,
            "relative": None if relative is None else round(relative, 2),
            "interval": None if interval is None else [round(end, 2) for end in interval],
        }
    return table


def judge_table(table: Mapping[str, Mapping[str, Any]], title: str) -> Any:
    """Build a table for the terminal.

    Args:
        table: From `tabulate`.
        title: Title of the table.

    Returns:
        A `rich.table.Table`.
    """
    from rich.table import Table
    from rich.text import Text

    missing = [status for status in STATUSES[2:] if table["all"][status]]
    view = Table(title=Text(title), title_justify="left")
    view.add_column("")
    for column in ("questions", "ours", "reference", "relative in %", "95% interval", "unparsed", *missing):
        view.add_column(column, justify="right")
    for category, row in table.items():
        formats = (("answer", ".2f"), ("reference", ".2f"), ("relative", ".1f"))
        shown = [DASH if row[name] is None else format(row[name], form) for name, form in formats]
        shown.append(DASH if row["interval"] is None else " - ".join(f"{end:.1f}" for end in row["interval"]))
        view.add_row(category, str(row["questions"]), *shown, *(str(row[status]) for status in ("unparsed", *missing)))
    return view


def score_llava_bench(
    cases: Sequence[JudgeCase],
    server: ChatServer,
    *,
    files: Mapping[str, Path],
    output: Path,
    prompts: Path | None,
    settings: JudgeSettings,
    budget: Budget,
    console: Any,
) -> dict[str, Any]:
    """Have the answers judged and write the report; judgements of an earlier run are reused.

    Args:
        cases: From `read_cases`.
        server: The server of the judge.
        files: The files of the cases by name, among them `answers`. The report has their hashes.
        output: Folder for the report and the ledger.
        prompts: Folder with prompts; None for the shipped ones.
        settings: Settings of the judge.
        budget: Limits on requests and cost.
        console: Console for progress messages.

    Returns:
        The report. Its key `complete` is true if the judge answered every question and scored at least one.

    Raises:
        UserError: If the judge cannot be used, or the folder has the report of other answers.
        StoppedError: After Ctrl-C.
    """
    texts = load_prompts(prompts)
    hashes = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    _refuse_other(output / REPORT, hashes["answers"])
    server = find_model(server)
    with open_judge_ledger(output) as ledger:
        budget.before = ledger.spent_under_caps()
        judge = Judge(cases, str(server.model), texts, settings, ledger)
        pending = [item.request for item in judge.pending().values()]
        _print_estimate(pending, len(cases) * len(settings.orders), budget, console)
        try:
            judge.run(server, budget)
        except KeyboardInterrupt:
            raise StoppedError(
                f"stopped; {ledger.count()} answers are in {ledger.file}; run the same command to resume"
            ) from None
        verdicts = judge.verdicts()
        report = {"benchmark": "LLaVA-Bench", "files": hashes} | _report(verdicts, server, judge, budget)
    with atomic_file(output / REPORT) as temporary:
        temporary.write_text(json.dumps(report, indent=2), encoding="utf-8")
    return report


def _refuse_other(file: Path, answers_hash: str) -> None:
    if not file.is_file():
        return
    try:
        other = json.loads(file.read_text(encoding="utf-8"))["files"]["answers"] != answers_hash
    except (ValueError, KeyError, TypeError):
        other = True
    if other:
        raise UserError(f"{file} is the report of other answers; choose another --output, or move the file")


def _report(verdicts: Sequence[Verdict], server: ChatServer, judge: Judge, budget: Budget) -> dict[str, Any]:
    settings = judge.settings
    priced = budget.price_in is not None
    return {
        "complete": {"scored"} <= {verdict.status for verdict in verdicts} <= {"scored", "unparsed"},
        "judge": {"url": server.url, "model": server.model, "model_told": sorted(judge.models)},
        "prompts": prompt_hashes(judge.prompts),
        "settings": {
            "orders": settings.orders,
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
            "attempts": ATTEMPTS,
        },
        "this_run": {
            "requests": budget.requests,
            "usd": round(budget.spent, 4) if priced else None,
            "usd_before": round(budget.before, 4) if budget.capped else None,
            "cap": _cap_reached(judge, budget),
        },
        "table": tabulate(verdicts),
        "questions": [
            {
                "question_id": item.case.question_id,
                "category": item.case.category,
                "status": item.status,
                "answer": item.answer,
                "reference": item.reference,
                "orders": dict(item.orders),
                **({"reason": item.reason} if item.reason else {}),
            }
            for item in verdicts
        ],
    }


def _cap_reached(judge: Judge, budget: Budget) -> str:
    """Return which cap ended the run and what to change; "" if none did."""
    pending = next(iter(judge.pending().values()), None)
    if pending is None or budget.max_cost is None or budget.most(pending.request) <= budget.max_cost:
        return budget.why_stopped()
    most = math.ceil(budget.most(pending.request) * 1e4) / 1e4
    return f"--max-cost {budget.max_cost:g} is below the {most:.4f} USD that one request may cost; raise it"


def print_report(report: Mapping[str, Any], title: str, output: Path, console: Any) -> None:
    """Print the table, the questions without a score, and the path of the report.

    Args:
        report: From `score_llava_bench`.
        title: Title of the table.
        output: Folder of the report.
        console: Console to print to.
    """
    console.print(judge_table(report["table"], title if report["complete"] else f"{title}, incomplete"))
    for status, explanation in (
        ("unparsed", f"no readable scores in {ATTEMPTS} replies of the judge; left out of the average"),
        ("failed", "the judge did not reply; run the same command to try again"),
        ("not asked", report["this_run"]["cap"] or "the cap was reached; run the same command to resume"),
    ):
        named = [item for item in report["questions"] if item["status"] == status]
        if named:
            ids = ", ".join(item["question_id"] for item in named[:_LISTED])
            ids += f" and {len(named) - _LISTED} more in the report" if len(named) > _LISTED else ""
            reason = f" ({named[0]['reason']})" if "reason" in named[0] else ""
            console.print(f"{len(named)} {status}: {explanation}{reason}: {ids}", soft_wrap=True)
    if not report["table"]["all"]["scored"]:
        console.print("no question was scored, so there is no score", soft_wrap=True)
    spent = "" if report["this_run"]["usd"] is None else f", {report['this_run']['usd']:.4f} USD"
    console.print(f"{report['this_run']['requests']} requests in this run{spent}; {output / REPORT}", soft_wrap=True)


def _print_estimate(requests: Sequence[ChatRequest], judgements: int, budget: Budget, console: Any) -> None:
    if not requests:
        console.print(f"all {judgements} judgements are in the ledger")
        return
    tokens_in = sum(estimate_tokens(request) for request in requests)
    tokens_out = sum(request.max_tokens for request in requests)
    cost = "" if budget.price_in is None else f"; up to {budget.cost(tokens_in, tokens_out):.2f} USD"
    console.print(f"{len(requests)} of {judgements} judgements to request", soft_wrap=True)
    console.print(
        f"about {tokens_in:,} prompt tokens (a high estimate from bytes), at most {tokens_out:,} reply tokens{cost}; "
        f"a reply without readable scores is requested up to {ATTEMPTS - 1} more times",
        soft_wrap=True,
    )


def dry_run(
    cases: Sequence[JudgeCase], prompts: Path | None, settings: JudgeSettings, budget: Budget, console: Any
) -> None:
    """Print one prompt of each category and the estimated cost, without any request.

    Args:
        cases: From `read_cases`.
        prompts: Folder with prompts; None for the shipped ones.
        settings: Settings of the judge.
        budget: Has the prices.
        console: Console to print to.
    """
    from rich.text import Text

    texts = load_prompts(prompts)
    for category in CATEGORIES:
        case = next((case for case in cases if case.category == category), None)
        if case is None:
            continue
        console.rule(Text(f"{category}, question {case.question_id}, {ORDERS[0].replace('_', ' ')}"))
        for message in judge_request(case, ORDERS[0], texts, settings).messages:
            console.print(Text(f"[{message['role']}]\n{message['content']}\n"), soft_wrap=True)
    console.rule()
    requests = [judge_request(case, order, texts, settings) for case in cases for order in settings.orders]
    _print_estimate(requests, len(requests), budget, console)
