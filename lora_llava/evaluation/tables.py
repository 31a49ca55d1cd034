"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table as RichTable

from lora_llava.evaluation.answer_metrics import DASH, score_cells, score_headings
from lora_llava.evaluation.answers import AnswerTable, is_answer_table
from lora_llava.evaluation.parsing.intervals import share_interval
from lora_llava.evaluation.scienceqa import COLUMNS, Table
from lora_llava.evaluation.summary import unparsed


def answer_rows(title: str, tables: Mapping[str, AnswerTable]) -> RichTable:
    """Build a table with one line for each table and group: every metric, and the number of questions.

    Args:
        title: Title of the table.
        tables: Tables by name, such as `before` and `after`.

    Returns:
        A table to print.
    """
    view = RichTable(title=title, title_justify="left")
    several = any(len(table) > 1 for table in tables.values())
    for column in ("", *(["group"] if several else []), *score_headings(), "questions"):
        view.add_column(column, justify="right" if column and column != "group" else "left")
    for name, table in tables.items():
        for group, scores in table.items():
            view.add_row(name, *([group] if several else []), *score_cells(scores), f"{scores['questions']:,}")
    return view


def percent_cells(table: Table) -> list[str]:
    """Format the percentages of a ScienceQA table; a dash for a column without questions."""
    return [f"{table[column][0]:.2f}" if table[column][2] else DASH for column in COLUMNS]


def interval_cells(table: Table) -> tuple[list[str], list[str]]:
    """Format the lower and upper ends of the columns' 95% intervals; a dash for a column without questions."""
    ends = [share_interval(*table[column][1:]) if table[column][2] else None for column in COLUMNS]
    low, high = ([DASH if end is None else f"{end[place]:.2f}" for end in ends] for place in (0, 1))
    return low, high


def tables_view(title: str, tables: Mapping[str, Any]) -> RichTable:
    """Build a table of either kind; see `table_rows` and `answer_rows`."""
    if any(is_answer_table(table) for table in tables.values()):
        return answer_rows(f"{title}, held-out rows", tables)
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
