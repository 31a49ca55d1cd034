"""Tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from lora_llava.evaluation.answer_metrics import DASH
from lora_llava.evaluation.answers import AnswerTable, is_answer_table
from lora_llava.evaluation.figures.figure_lines import (
    INTERVAL,
    RECALL_HEADINGS,
    balanced_note,
    cells,
    confusion_title,
    figure_lines,
    headings,
    line_notes,
    matrix,
    read_confusions,
    recall_cells,
)
from lora_llava.evaluation.parsing.intervals import share_interval
from lora_llava.evaluation.scienceqa import COLUMNS, Table
from lora_llava.evaluation.summary import unparsed

_MATRIX_WIDTH = 76
"""Widest confusion table that is shown as a matrix in the terminal; a wider one is a line for each reference."""


def answer_rows(title: str, tables: Mapping[str, AnswerTable], figures: Mapping[str, Any] | None = None) -> RichTable:
    """Build a table of free answers, group by group: every metric with its interval, and the number of questions.

    Args:
        title: Title of the table.
        tables: Tables by name, such as `before` and `after`.
        figures: From `build_figures`; they add lines, such as the majority answer's.

    Returns:
        A table to print.
    """
    view = _open_table(title)
    lines = figure_lines(tables, figures)
    several = len({line.group for line in lines}) > 1
    indent = "  " if several else ""
    view.add_column("", min_width=max((len(indent + line.title) for line in lines), default=0))
    for column in headings():
        view.add_column(_in_lines(column), justify="right", no_wrap=True)
    view.add_column("questions", justify="right", no_wrap=True)
    group = ""
    for line in lines:
        if several and line.group != group:
            group = line.group
            view.add_row(Text(group, style="bold"))
        view.add_row(Text(indent + line.title), *cells(line), f"{line.scores['questions']:,}")
    return view


def _in_lines(heading: str) -> str:
    """Break a heading into lines of a word each, a unit kept with its `in`."""
    return re.sub(r"(?<! in) ", "\n", heading) if heading != INTERVAL else heading


def _open_table(title: str | None = None) -> RichTable:
    """Return a table with a line below its headings and no other, so that much fits into 80 columns."""
    return RichTable(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )


def figures_view(figures: Mapping[str, Any]) -> list[RenderableType]:
    """Build what follows the table of scores: notes, a confusion table for each group of few answers, and sentences."""
    found: list[RenderableType] = [Text(note, style="dim") for note in line_notes(figures)]
    for saved, confusion in zip(figures.get("confusion", []), read_confusions(figures), strict=True):
        columns, rows = matrix(confusion)
        if sum(max(map(len, each)) + 2 for each in zip(columns, *rows, strict=True)) > _MATRIX_WIDTH:
            columns, rows = list(RECALL_HEADINGS), recall_cells(confusion, saved)
        view = _open_table()
        for place, column in enumerate(columns):
            left = place == 0 or column == RECALL_HEADINGS[-1]
            view.add_column(Text(column), justify="left" if left else "right", overflow="fold")
        for row in rows:
            view.add_row(*map(Text, row))
        title = Text(confusion_title(confusion), style="italic")  # a table's own title would wrap at its width
        found += [Text(), title, view, Text(balanced_note(confusion, figures))]
    return [*found, Text(), *(Text(f"- {sentence}") for sentence in figures.get("sentences", []))]


def percent_cells(table: Table) -> list[str]:
    """Format the percentages of a ScienceQA table; a dash for a column without questions."""
    return [f"{table[column][0]:.2f}" if table[column][2] else DASH for column in COLUMNS]


def interval_cells(table: Table) -> tuple[list[str], list[str]]:
    """Format the lower and upper ends of the columns' 95% intervals; a dash for a column without questions."""
    ends = [share_interval(*table[column][1:]) if table[column][2] else None for column in COLUMNS]
    low, high = ([DASH if end is None else f"{end[place]:.2f}" for end in ends] for place in (0, 1))
    return low, high


def tables_view(
    title: str, tables: Mapping[str, Any], figures: Mapping[str, Any] | None = None, rows: str = "held-out rows"
) -> RichTable | Group:
    """Build a table of either kind, with the figures of free answers; see `table_rows` and `answer_rows`.

    Args:
        title: Title of the table.
        tables: Tables by name.
        figures: From `build_figures`.
        rows: What the rows are, for the title of free answers; empty if the title says it.
    """
    if any(is_answer_table(table) for table in tables.values()):
        view = answer_rows(f"{title}, {rows}" if rows else title, tables, figures)
        return Group(view, *figures_view(figures)) if figures else view
    return table_rows(title, tables)


def table_rows(title: str, tables: Mapping[str, Table]) -> RichTable:
    """Build a table with one line of percentages for each ScienceQA table, and a last line of question counts.

    A single table also gets two lines with its 95% intervals.

    Args:
        title: Title of the table.
        tables: Tables by name, such as `before` and `after`.

    Returns:
        A table to print.
    """
    view = RichTable(title=title, title_justify="left")
    view.add_column("accuracy in %")
    for column in (*COLUMNS, "unparsed"):
        view.add_column(column, justify="right", no_wrap=column != "unparsed")
    for name, table in tables.items():
        share = unparsed(table)
        name = f"{name}, letters read by the {table['parser']} parser" if "parser" in table else name
        unread = f"{share['count']} ({share['percent']:.1f}%)" if share["count"] else "0"
        view.add_row(name, *percent_cells(table), unread)
    last = list(tables.values())[-1]
    if len(tables) == 1:
        for name, ends in zip(("95% interval from", "to"), interval_cells(last), strict=True):
            view.add_row(name, *ends, "")
    view.add_section()
    view.add_row("questions", *(str(last[column][2]) for column in COLUMNS), "")
    return view
