"""The table of a sweep in the terminal, and its page with table and plots."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table as RichTable

from lora_llava.evaluation.figures.page_tables import score_tables
from lora_llava.evaluation.tables import tables_view
from lora_llava.pages.report_page import Table
from lora_llava.pages.report_plots import SERIES_COLOURS, Curve
from lora_llava.pages.sweep_page import Spread, SweepPage, render_sweep
from lora_llava.recipe.mistakes import write_value
from lora_llava.training.sweep.grid import Sweep, describe
from lora_llava.training.sweep.sweep_results import By, SettingResult, SweepResult, title_of, write_figures

PAGE = "sweep.html"
_NAMES: dict[By, str] = {"loss": "validation loss", "score": "validation score, %"}


def sweep_rows(result: SweepResult) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of the table: a row for each setting, the best first."""
    keys = list(result.settings[0].setting)
    columns: list[By] = ["loss", "score"] if any(each.values("score") for each in result.settings) else ["loss"]
    headings = ["", *(key.rpartition(".")[2] for key in keys)]
    headings += [part for by in columns for part in (_NAMES[by], "± SD")]
    rows = []
    for number, each in enumerate(result.settings, start=1):
        cells = [str(number), *(write_value(each.setting[key]) for key in keys)]
        for by in columns:
            digits = 4 if by == "loss" else 2
            spread = each.spread(by)
            cells.append(f"{each.mean(by):.{digits}f}" if each.values(by) else "-")
            cells.append(f"{spread:.{digits}f}" if spread is not None else "-")
        rows.append([*cells, _count(each)])
    return [*headings, "runs"], rows


def _count(each: SettingResult) -> str:
    count, failed = len(each.finished), len(each.runs) - len(each.finished)
    return f"{count}, {failed} failed" if failed else str(count)


def print_sweep(result: SweepResult) -> list[RenderableType]:
    """Return what the terminal shows: the table, the choice, the failures and the test table."""
    headings, rows = sweep_rows(result)
    view = RichTable(title="Sweep, mean over seeds, the best setting first", title_justify="left")
    for heading in headings:
        view.add_column(heading, justify="right")
    for row in rows:
        view.add_row(*row)
    shown: list[RenderableType] = [view, *choice(result)]
    if result.test is not None and result.chosen is not None:
        shown.append(tables_view("Test rows", {result.chosen.name: result.test}, rows=""))
    return shown


def choice(result: SweepResult) -> list[str]:
    """Return sentences: what was chosen and how, what failed, what was asked of the test rows."""
    assert result.chosen is not None
    best, by = result.settings[0], result.by
    direction = "lowest mean validation loss" if by == "loss" else "highest mean validation score"
    lines = [
        f"chosen: {describe(best.setting)}, by the {direction}; its run: {result.chosen.name} ({result.why})",
        *(f"failed: {failure}" for failure in result.failures),
        *result.notes,
    ]
    return [*lines, result.test_note]


def write_page(sweep: Sweep, result: SweepResult) -> Path:
    """Write `sweep.json` and `sweep.html`.

    Args:
        sweep: The sweep.
        result: From `ask_test`.

    Returns:
        The page.
    """
    write_figures(sweep, result)
    headings, rows = sweep_rows(result)
    tables = [Table("Settings, the best first", headings, rows), _runs_table(result)]
    page = SweepPage(
        title=f"{sweep.folder.name}: sweep",
        facts=[
            ("settings", str(len(result.settings))),
            ("runs", str(len(sweep.runs))),
            ("chosen by", f"validation {result.by}, mean over seeds"),
            ("chosen", title_of(result.settings[0].setting)),
        ],
        notes=choice(result),
        tables=tables + _test_tables(result),
        spread=Spread(_NAMES[result.by], [each.values(result.by) for each in result.settings]),
        curve=Curve("Validation loss, mean over seeds", "nats per token", _curves(result.settings)),
    )
    file = sweep.folder / PAGE
    file.write_text(render_sweep(page), encoding="utf-8")
    return file


def _runs_table(result: SweepResult) -> Table:
    rows = []
    for number, each in enumerate(result.settings, start=1):
        for run in each.runs:
            score = "-" if run.score is None else f"{run.score:.2f}"
            figures = ["failed", "-", "-"] if run.failure else [f"{run.loss:.4f}", f"{run.step:,}", score]
            rows.append([run.name, str(number), *figures])
    return Table("Runs", ["run", "setting", "validation loss", "kept step", "score"], rows)


def _test_tables(result: SweepResult) -> list[Table]:
    if result.test is None or result.chosen is None:
        return []
    tables = score_tables({result.chosen.name: dict(result.test)})
    return [replace(table, title=f"Test rows, {result.chosen.name}") for table in tables]


def _curves(settings: Sequence[SettingResult]) -> dict[str, list[tuple[float, float]]]:
    """Return the mean curve of the best settings, at the steps that all its runs were validated at."""
    found = {}
    for each in settings[:SERIES_COLOURS]:
        curves = [dict(run.curve) for run in each.finished]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        found[title_of(each.setting)] = [(step, statistics.fmean(curve[step] for curve in curves)) for step in steps]
    return found
