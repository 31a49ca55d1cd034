"""ScienceQA tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table as RichTable

from lora_llava.evaluation.scienceqa import COLUMNS, Table


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
