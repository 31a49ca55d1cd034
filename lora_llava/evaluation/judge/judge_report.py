"""`lora-llava score llava-bench`: judged answers as a table of relative scores."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_llava.core.errors import StoppedError, UserError
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
from lora_llava.inference.budget import Budget, estimate_tokens
from lora_llava.inference.chat_request import ChatRequest
from lora_llava.inference.client import ChatServer, find_model

REPORT = "llava_bench.json"
STATUSES = ("scored", "unparsed", "failed", "not asked")
_RESAMPLES = 2_000
_LISTED = 20
"""Ids that are printed; the report has all."""
DASH = "–"


def relative_score(answers: Sequence[float], references: Sequence[float]) -> float | None:
    """The answers' scores in percent of the references', mean over mean (llava/eval/summarize_gpt_review.py).

    Args:
        answers: One a question.
        references: The same of the reference.

    Returns:
        None where there is nothing to divide by.
    """
    return 100 * sum(answers) / sum(references) if sum(references) else None


def ratio_interval(answers: Sequence[float], references: Sequence[float]) -> tuple[float, float] | None:
    """Percentile bootstrap of the relative score (scipy.stats.bootstrap, paired): questions are resampled, each with
    both its scores.

    Args:
        answers: One a question.
        references: The same of the reference.

    Returns:
        The lower and the upper end in percent; None for fewer than two questions, which say nothing of their spread,
        and where an end is infinite, as the references of what is resampled come to 0 too often.
    """
    import numpy as np
    from scipy.stats import bootstrap

    from lora_llava.evaluation.intervals import LEVEL

    if len(answers) < 2:
        return None

    def statistic(mine: Any, theirs: Any, axis: int = -1) -> Any:
        return 100 * mine.sum(axis=axis) / theirs.sum(axis=axis)

    samples = (np.asarray(answers, dtype=float), np.asarray(references, dtype=float))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = bootstrap(
            samples, statistic, paired=True, confidence_level=LEVEL, n_resamples=_RESAMPLES, method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def tabulate(verdicts: Sequence[Verdict]) -> dict[str, dict[str, Any]]:
    """Average over each category and over all; what is not scored is counted and not averaged.

    Args:
        verdicts: Of all questions.

    Returns:
        By category, `all` last: the number of questions by status, mean scores `answer` and `reference`, and `relative`
        in percent with its 95% `interval`; None where nothing is scored, and see `ratio_interval`.
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
    """A table for the terminal.

    Args:
        table: From `tabulate`.
        title: Stands above.

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
        marks = (("answer", ".2f"), ("reference", ".2f"), ("relative", ".1f"))
        shown = [DASH if row[name] is None else format(row[name], form) for name, form in marks]
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
    """Judge, and write the report; what an earlier run asked for is not asked for again.

    Args:
        cases: From `read_cases`.
        server: The judge.
        files: Where the cases are from, by name; `answers` among them. The report holds their hashes.
        output: Folder of report and ledger.
        prompts: Folder of other prompts than ours.
        settings: How is judged.
        budget: What may be asked.
        console: Told what is done.

    Returns:
        The report; its `complete` says whether every question was asked and answered, and one at least scored.

    Raises:
        UserError: Where the judge cannot be used, or the folder has the report of other answers.
        StoppedError: After Ctrl-C.
    """
    texts = load_prompts(prompts)
    hashes = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    _refuse_other(output / REPORT, hashes["answers"])
    server = find_model(server)
    with open_judge_ledger(output) as ledger:
        budget.before = ledger.spent_under_caps()
        judge = Judge(cases, str(server.model), texts, settings, ledger)
        to_ask = [item.request for item in judge.pending().values()]
        _print_estimate(to_ask, len(cases) * len(settings.orders), budget, console)
        try:
            judge.run(server, budget)
        except KeyboardInterrupt:
            raise StoppedError(
                f"stopped; {ledger.count()} answers are in {ledger.file}, and the same command goes on"
            ) from None
        verdicts = judge.verdicts()
        report = {"benchmark": "LLaVA-Bench", "files": hashes} | _report(verdicts, server, judge, budget)
    file = output / REPORT
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(report, indent=2), encoding="utf-8")
    temporary.replace(file)
    return report


def _refuse_other(file: Path, answers_hash: str) -> None:
    if not file.is_file():
        return
    try:
        other = json.loads(file.read_text(encoding="utf-8"))["files"]["answers"] != answers_hash
    except (ValueError, KeyError, TypeError):
        other = True
    if other:
        raise UserError(f"{file} is the report of other answers; name another folder with --output, or move it away")


def _report(verdicts: Sequence[Verdict], server: ChatServer, judge: Judge, budget: Budget) -> dict[str, Any]:
    settings = judge.settings
    priced = budget.price_in is not None
    return {
        "complete": {"scored"} <= {verdict.status for verdict in verdicts} <= {"scored", "unparsed"},
        "judge": {"url": server.url, "model": server.model, "model_told": sorted(judge.models)},
        "prompts": prompt_hashes(judge.prompts),
        "settings": {
            "orders": settings.orders, "temperature": settings.temperature, "max_tokens": settings.max_tokens,
            "attempts": ATTEMPTS,
        },
        "this_run": {
            "requests": budget.requests, "usd": round(budget.spent, 4) if priced else None,
            "usd_before": round(budget.before, 4) if budget.capped else None,
            "cap": _what_caps(judge, budget),
        },
        "table": tabulate(verdicts),
        "questions": [
            {
                "question_id": item.case.question_id, "category": item.case.category, "status": item.status,
                "answer": item.answer, "reference": item.reference, "orders": dict(item.orders),
                **({"reason": item.reason} if item.reason else {}),
            }
            for item in verdicts
        ],
    }  # fmt: skip


def _what_caps(judge: Judge, budget: Budget) -> str:
    """Which cap ended the run and what to change; nothing where none did."""
    pending = next(iter(judge.pending().values()), None)
    if pending is None or budget.max_cost is None or budget.most(pending.request) <= budget.max_cost:
        return budget.why_stopped()
    most = math.ceil(budget.most(pending.request) * 1e4) / 1e4
    return f"--max-cost {budget.max_cost:g} is below the {most:.4f} USD that one request may cost; raise it"


def print_report(report: Mapping[str, Any], title: str, output: Path, console: Any) -> None:
    """Print the table, what is not in it, and where the report is.

    Args:
        report: From `score_llava_bench`.
        title: Stands above.
        output: The report's folder.
        console: Printed to.
    """
    console.print(judge_table(report["table"], title if report["complete"] else f"{title}, incomplete"))
    for status, mend in (
        ("unparsed", f"no readable scores in {ATTEMPTS} texts of the judge; not averaged in"),
        ("failed", "the judge gave no text; the same command tries again"),
        ("not asked", report["this_run"]["cap"] or "the cap was reached; the same command goes on"),
    ):
        named = [item for item in report["questions"] if item["status"] == status]
        if named:
            ids = ", ".join(item["question_id"] for item in named[:_LISTED])
            ids += f" and {len(named) - _LISTED} more in the report" if len(named) > _LISTED else ""
            reason = f" ({named[0]['reason']})" if "reason" in named[0] else ""
            console.print(f"{len(named)} {status}: {mend}{reason}: {ids}", soft_wrap=True)
    if not report["table"]["all"]["scored"]:
        console.print("no question was scored: there is no score", soft_wrap=True)
    spent = "" if report["this_run"]["usd"] is None else f", {report['this_run']['usd']:.4f} USD"
    console.print(f"{report['this_run']['requests']} requests in this run{spent}; {output / REPORT}", soft_wrap=True)


def _print_estimate(requests: Sequence[ChatRequest], judgements: int, budget: Budget, console: Any) -> None:
    if not requests:
        console.print(f"all {judgements} judgements are answered")
        return
    tokens_in = sum(estimate_tokens(request) for request in requests)
    tokens_out = sum(request.max_tokens for request in requests)
    cost = "" if budget.price_in is None else f"; up to {budget.cost(tokens_in, tokens_out):.2f} USD"
    console.print(f"{len(requests)} of {judgements} judgements to ask for", soft_wrap=True)
    console.print(
        f"about {tokens_in:,} tokens there (estimated from bytes, rather too many), at most {tokens_out:,} back{cost}; "
        f"a text without readable scores is asked for up to {ATTEMPTS - 1} times more",
        soft_wrap=True,
    )


def dry_run(
    cases: Sequence[JudgeCase], prompts: Path | None, settings: JudgeSettings, budget: Budget, console: Any
) -> None:
    """Print a prompt of each category and what all would cost; nobody is asked.

    Args:
        cases: From `read_cases`.
        prompts: Folder of other prompts than ours.
        settings: How is judged.
        budget: Knows the prices.
        console: Printed to.
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
