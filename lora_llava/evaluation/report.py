"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table as RichTable

from lora_llava.evaluation.answers import AnswerTable, is_answer_table
from lora_llava.evaluation.scienceqa import COLUMNS, Table


def answer_rows(title: str, tables: Mapping[str, AnswerTable]) -> RichTable:
    """One line a table and source: exact match, F1 and questions.

    Args:
        title: Stands above.
        tables: By name, such as `before` and `after`.

    Returns:
        A table to print.
    """
    view = RichTable(title=title, title_justify="left")
    several = any(len(table) > 1 for table in tables.values())
    for column in ("", *(["source"] if several else []), "exact match in %", "F1 in %", "questions"):
        view.add_column(column, justify="right" if column and column != "source" else "left")
    for name, table in tables.items():
        for source, (exact, f1, count) in table.items():
            view.add_row(name, *([source] if several else []), f"{exact:.2f}", f"{f1:.2f}", f"{int(count):,}")
    return view


def tables_view(title: str, tables: Mapping[str, Any]) -> RichTable:
    """Tables of either kind; see `table_rows` and `answer_rows`."""
    if any(is_answer_table(table) for table in tables.values()):
        return answer_rows(f"{title}, held-back rows", tables)
    return table_rows(title, tables)


def table_rows(title: str, tables: Mapping[str, Table]) -> RichTable:
    """One line a table: percentages, with the questions counted below each column's name.

    Args:
        title: Stands above.
        tables: By name, such as `before` and `after`.

    Returns:
        A table to print.
    """
    view = RichTable(title=title, title_justify="left")
    view.add_column("accuracy in %")
    for column in (*COLUMNS, "unparsed"):
        view.add_column(column, justify="right")
    for name, table in tables.items():
        view.add_row(name, *(f"{table[column][0]:.2f}" for column in COLUMNS), str(table["unparsed"]))
    last = list(tables.values())[-1]
    view.add_section()
    view.add_row("questions", *(str(last[column][2]) for column in COLUMNS), "")
    return view
