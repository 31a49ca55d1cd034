"""Published results on ScienceQA's test split, for comparison."""

from __future__ import annotations

from typing import Any

from rich.table import Table as RichTable

from lora_llava.evaluation.scienceqa import COLUMNS

QUESTIONS = 4_241
"""Questions of the test split (pid_splits.json of github.com/lupantech/ScienceQA), the base of all these results."""
_LEADERBOARD = "ScienceQA's leaderboard"
_LAVIN = "README of github.com/luogen1996/LaVIN, 4-bit, the average alone"


def _row(source: str, *percentages: float) -> dict[str, Any]:
    where = source if source == _LAVIN else f"{source} and {_LEADERBOARD}"
    return {"columns": dict(zip(COLUMNS, percentages, strict=False)), "source": where}


# From the leaderboard at github.com/lupantech/ScienceQA, and from LaVIN's README for rows it does not list.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Human": _row("arXiv 2209.09513", 88.40, 90.23, 84.97, 87.48, 89.60, 87.50, 88.10, 91.59, 82.42),
    "MM-CoT base": _row("arXiv 2302.00923", 84.91, 87.52, 77.17, 85.82, 87.88, 82.90, 86.83, 84.65, 85.37),
    "MM-CoT large": _row("arXiv 2302.00923", 91.68, 95.91, 82.00, 90.82, 95.26, 88.80, 92.89, 92.44, 90.31),
    "LaVIN-lite 7B": _row(_LAVIN, 88.35),
    "LaVIN-lite 13B": _row(_LAVIN, 89.44),
    "LaVIN 7B": _row("arXiv 2305.15023", 89.41, 89.25, 94.94, 85.24, 88.51, 87.46, 88.08, 90.16, 88.07),
    "LaVIN 13B": _row("arXiv 2305.15023", 90.83, 89.88, 94.49, 89.82, 88.95, 87.61, 91.85, 91.45, 89.72),
    "LLaVA 13B": _row("arXiv 2304.08485, table 7", 90.92, 90.36, 95.95, 88.00, 89.49, 88.00, 90.66, 90.93, 90.90),
    "LLaVA 13B + GPT-4": _row(
        "arXiv 2304.08485, table 7", 92.53, 91.56, 96.74, 91.09, 90.62, 88.99, 93.52, 92.73, 92.16
    ),
}
"""By name: `columns` in percent, as far as they are reported, and `source`."""


def published_cells(columns: dict[str, float]) -> list[str]:
    """Format the nine cells of a row, with a dash for a column that is not reported."""
    return [f"{columns[column]:.2f}" if column in columns else "–" for column in COLUMNS]


def published_table() -> RichTable:
    """Build the table of published results for the terminal."""
    view = RichTable(title=f"Published, {QUESTIONS:,} test questions", title_justify="left")
    view.add_column("accuracy in %")
    for column in COLUMNS:
        view.add_column(column, justify="right")
    for name, row in PUBLISHED.items():
        view.add_row(name, *published_cells(row["columns"]))
    return view


def published_sources() -> str:
    """Return the sources of the rows, on one line."""
    names: dict[str, list[str]] = {}
    for name, row in PUBLISHED.items():
        names.setdefault(row["source"], []).append(name)
    sources = "; ".join(f"{', '.join(mine)}: {source}" for source, mine in names.items())
    return f"{sources} (github.com/lupantech/ScienceQA)"
