"""Summary of a generated data set as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_llava.synthesis.gates.gates import REASONS
from lora_llava.synthesis.output import CARD_FILE, GALLERY_FILE, INSTRUCT_FILE, REJECTED_FILE

_NAMED = 5
_STATUSES = ("tasks", "rows", "rejected", "failed", "not_asked")


def print_summary(summary: Mapping[str, Any], output_dir: str, console: Console) -> None:
    """Print the counts by flavour, the reasons for rejections, and the files written.

    Args:
        summary: Summary from `generate`.
        output_dir: Folder of the data set.
        console: Console to print to.
    """
    console.print(_counts(summary))
    if summary["reasons"]:
        console.print(_reasons(summary["reasons"]))
    if count := summary["cut_off_kept"]:
        line = "answers end in the middle; the rows have their whole turns (raise teacher.max_tokens for longer ones)"
        console.print(f"{count:,} {line}", soft_wrap=True, markup=False)
    if line := describe_ungrounded(summary["ungrounded"]):
        console.print(line, soft_wrap=True, markup=False)
    for reason, count in summary["failures"].items():
        console.print(f"{count:,} requests failed: {reason}", soft_wrap=True, markup=False)
    if not summary["complete"]:
        console.print("the set is incomplete; run the same command to resume", soft_wrap=True)
    ledger = summary["ledger"]
    usd = "" if ledger["usd"] is None else f", {ledger['usd']:.4f} USD"
    tokens = f"{ledger['prompt_tokens']:,} prompt tokens, {ledger['completion_tokens']:,} completion tokens"
    console.print(f"total: {ledger['answers']:,} answers, {tokens}{usd}", soft_wrap=True)
    folder = Path(output_dir)
    others = ", ".join((REJECTED_FILE, CARD_FILE, GALLERY_FILE))
    console.print(f"{summary['rows']:,} rows in {folder / INSTRUCT_FILE}; in the same folder: {others}", soft_wrap=True)


def describe_ungrounded(found: Mapping[str, Any]) -> str:
    """Describe in a line how many things of the rows appear in no caption or box; empty if the rows name none."""
    if not found["things"]:
        return ""
    common = ", ".join(f"{name} {count:,}" for name, count in list(found["most_common"].items())[:_NAMED])
    named = f"; most often: {common}" if common else ""
    return (
        f"ungrounded: {found['missing']:,} of {found['things']:,} things and names in the rows ({found['share']:.1%}) "
        f"appear in no caption or box{named}"
    )


def _counts(summary: Mapping[str, Any]) -> Table:
    names = [name for name in _STATUSES if name in ("tasks", "rows", "rejected") or summary[name]]
    view = Table(title="Samples", title_justify="left")
    view.add_column("")
    for name in (*names, "answers", "words per answer"):
        view.add_column(name.replace("_", " "), justify="right")
    for flavour, counts in summary["flavours"].items():
        words = counts["words_per_answer"]
        average = "-" if words is None else f"{words:.1f}"
        view.add_row(flavour, *(f"{counts[name]:,}" for name in names), f"{counts['turns']:,}", average)
    view.add_section()
    view.add_row("all", *(f"{summary[name]:,}" for name in names), f"{summary['turns']:,}", "")
    return view


def _reasons(reasons: Mapping[str, Mapping[str, int]]) -> Table:
    view = Table(title="Rejected answers", title_justify="left")
    view.add_column("reason")
    for name in ("answers", "samples given up"):
        view.add_column(name, justify="right")
    view.add_column("description")
    for reason, counts in reasons.items():
        view.add_row(reason, f"{counts['attempts']:,}", f"{counts['given_up']:,}", REASONS[reason])
    return view
