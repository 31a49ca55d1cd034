"""Tables of scores and confusion on a run's page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_llava.evaluation.answers import is_answer_table
from lora_llava.evaluation.figures.figure_lines import (
    INTERVAL,
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
from lora_llava.evaluation.scienceqa import COLUMNS
from lora_llava.evaluation.tables import interval_cells, percent_cells
from lora_llava.pages.report_page import Table


def score_tables(tables: dict[str, Any], figures: Mapping[str, Any] | None = None) -> list[Table]:
    """Return the tables of scores for a page; none without scores.

    Args:
        tables: Tables of ScienceQA or of free answers by name, such as `before` and `after`.
        figures: The figures of a run of free answers, as in `metrics.json`.
    """
    if not tables:
        return []
    if any(is_answer_table(table) for table in tables.values()):
        lines = figure_lines(tables, figures)
        columns = ["", *headings(), "questions"]
        rows = [[line.title, *cells(line), f"{line.scores['questions']:,}"] for line in lines]
        groups = [line.group for line in lines] if len({line.group for line in lines}) > 1 else []
        return [Table("Answers to held-out rows", columns, rows, groups=groups, note=" ".join(line_notes(figures)))]
    rows = [[name, *percent_cells(table)] for name, table in tables.items()]
    last = tables[list(tables)[-1]]
    rows += [[f"95% {name}", *ends] for name, ends in zip(("from", "to"), interval_cells(last), strict=True)]
    rows.append(["questions", *(f"{last[column][2]:,}" for column in COLUMNS)])
    parser = next(
        (f", letters read by the {table['parser']} parser" for table in tables.values() if "parser" in table), ""
    )
    return [Table(f"Accuracy in % on the test split{parser}", ["", *COLUMNS], rows)]


def confusion_tables(figures: Mapping[str, Any] | None) -> list[Table]:
    """Return a matrix for each group of few answers, with rows and recall by reference."""
    found = []
    for saved, confusion in zip((figures or {}).get("confusion", []), read_confusions(figures), strict=True):
        columns, rows = matrix(confusion)
        ends = [each[3] for each in recall_cells(confusion, saved)]
        rows = [[*row, end] for row, end in zip(rows, ends, strict=True)]
        note = balanced_note(confusion, figures or {})
        found.append(Table(confusion_title(confusion), [*columns, INTERVAL], rows, note=note, diagonal=True))
    return found
