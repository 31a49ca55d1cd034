"""Render a comparison as a table for the terminal, Markdown or LaTeX, or as JSON."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_llava.core.errors import UserError
from lora_llava.evaluation.answer_metrics import DASH
from lora_llava.evaluation.compare.compare_files import SCIENCEQA
from lora_llava.evaluation.compare.comparison import Comparison, Discordance
from lora_llava.evaluation.compare.comparison import Group as RunGroup
from lora_llava.evaluation.published import PUBLISHED, QUESTIONS, published_cells, published_sources
from lora_llava.pages.preview_samples import escape_hidden

FORMATS = ("terminal", "markdown", "latex")
WIDTH = 100
"""Width in characters of a terminal table that is written to a file."""
_SETTINGS = 3
"""Most settings that are shown with a group; the JSON has all."""

Cell = tuple[str, str]
"""A value, and a secondary text below it: a deviation, an interval or the settings."""


@dataclass(frozen=True)
class Sheet:
    """A table before it is rendered.

    Attributes:
        title: Title of the table.
        columns: Headings; the first column has text, the others have numbers.
        rows: Cells; None is a separator line.
    """

    title: str
    columns: list[str]
    rows: list[list[Cell] | None]


def render(comparison: Comparison, kind: str, published: bool = False) -> str:
    """Render a comparison as text.

    Args:
        comparison: From `compare_runs`.
        kind: One of `FORMATS`.
        published: Whether to append the published ScienceQA rows.

    Returns:
        The text, with a line break at its end.

    Raises:
        UserError: If published rows are requested for answers to conversations.
    """
    if kind == "terminal":
        stream = io.StringIO()
        Console(file=stream, width=WIDTH, color_system=None).print(terminal_view(comparison, published))
        return "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())
    sheets, notes = build_sheets(comparison, published)
    return _markdown(sheets, notes) if kind == "markdown" else _latex(sheets, notes)


def as_json(comparison: Comparison, published: bool = False) -> str:
    """Render a comparison as JSON, unrounded."""
    if published:
        _check_published(comparison)
    groups = [
        {
            "name": group.name,
            "settings": group.settings,
            "runs": [{"file": str(run.file), "seed": run.seed, "questions": len(run.rows)} for run in group.runs],
            "columns": {
                column: {"mean": group.mean(column), "deviation": group.deviation(column), "values": values}
                for column, values in group.columns.items()
            },
            "interval": group.interval(),
        }
        for group in comparison.groups
    ]
    tests = [asdict(test) | {"difference": test.difference} for test in comparison.tests]
    content = {"kind": comparison.kind, "groups": groups, "tests": tests, "notes": comparison.notes}
    return json.dumps(content | ({"published": PUBLISHED} if published else {}), indent=2, ensure_ascii=False) + "\n"


def _check_published(comparison: Comparison) -> None:
    if comparison.kind != SCIENCEQA:
        raise UserError(
            "--published: the published rows are for ScienceQA, but these runs answer conversations; leave it out"
        )


def build_sheets(comparison: Comparison, published: bool) -> tuple[list[Sheet], list[str]]:
    """Build the table of scores, the table of tests if there are any, and the notes.

    Raises:
        UserError: If published rows are requested for answers to conversations.
    """
    first = comparison.columns[0]
    counts = comparison.questions
    questions = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    science = comparison.kind == SCIENCEQA
    title = f"{'ScienceQA' if science else 'Answers'}, {questions} question{'' if counts == [1] else 's'}"
    heading = f"{'accuracy' if science else 'scores'} in %"
    rows: list[list[Cell] | None] = [_group_row(group, comparison.columns) for group in comparison.groups]
    notes = _explain(comparison, first)
    if published:
        _check_published(comparison)
        rows += [
            None,
            *(
                [(name, ""), *((cell, "") for cell in published_cells(row["columns"]))]
                for name, row in PUBLISHED.items()
            ),
        ]
        other = "" if counts == [QUESTIONS] else f"; the runs above answered {questions} questions"
        notes += [
            f"published results are on the {QUESTIONS:,} questions of the test split{other}",
            published_sources(),
        ]
    sheets = [Sheet(title, [heading, *comparison.columns], rows)]
    if comparison.tests:
        sheets.append(_test_sheet(comparison.tests))
    return sheets, notes


def _group_row(group: RunGroup, columns: Sequence[str]) -> list[Cell]:
    cells: list[Cell] = [(group.name, _settings(group.settings))]
    for column in columns:
        mean, deviation = group.mean(column), group.deviation(column)
        under = f"± {deviation:.2f}" if deviation is not None else ""
        cells.append((DASH if mean is None else f"{mean:.2f}", under))
    interval = group.interval()
    if interval is not None:
        cells[1] = (cells[1][0], f"({interval[0]:.1f}–{interval[1]:.1f})")
    return cells


def _settings(settings: Mapping[str, Any]) -> str:
    shown = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in list(settings.items())[:_SETTINGS]
    ]
    more = len(settings) - _SETTINGS
    text = ", ".join(shown) + (f" and {more} more, see --json" if more > 0 else "")
    return f"({text})" if text else ""


def _explain(comparison: Comparison, first: str) -> list[str]:
    several = [group for group in comparison.groups if len(group.runs) > 1]
    notes = list(comparison.notes)
    if several:
        seeds = "; ".join(f"{group.name}: {', '.join(str(run.seed) for run in group.runs)}" for group in several)
        notes.append(f"mean ± sample standard deviation over seeds ({seeds})")
    if len(several) < len(comparison.groups):
        notes.append(f"in brackets: 95% interval of {first} (Wilson)")
    files = dict.fromkeys(run.file.name for group in comparison.groups for run in group.runs)
    notes.append(f"answers from {', '.join(files)}")
    if comparison.tests:
        more = f"; Holm: corrected for {len(comparison.tests)} tests" if len(comparison.tests) > 1 else ""
        notes.append(
            f"difference: {first}, in percentage points; p: exact two-sided McNemar test on the questions that only "
            f"one of the two answers right{more}"
        )
    return notes


def _test_sheet(tests: Sequence[Discordance]) -> Sheet:
    with_seed = any(test.seeds != tests[0].seeds or test.seeds[0] != test.seeds[1] for test in tests)
    columns = [
        f"against {tests[0].first}",
        *(["seeds"] if with_seed else []),
        "difference",
        "only first right",
        "only this right",
        "p",
        *(["p (Holm)"] if len(tests) > 1 else []),
    ]
    rows: list[list[Cell] | None] = []
    for test in tests:
        seeds = [DASH if seed is None else str(seed) for seed in dict.fromkeys(test.seeds)]
        values = [
            test.other,
            *([", ".join(seeds)] if with_seed else []),
            f"{test.difference:+.2f}".replace("-", "−"),
            f"{test.only_first:,}",
            f"{test.only_other:,}",
            write_p(test.p),
            *([write_p(test.holm)] if len(tests) > 1 else []),
        ]
        rows.append([(value, "") for value in values])
    return Sheet("Paired, on the same questions", columns, rows)


def write_p(p: float) -> str:
    """Format a p value to four decimals, or as `< 0.0001`."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def terminal_view(comparison: Comparison, published: bool = False) -> RenderableType:
    """Build the tables and notes for a terminal of at least 100 columns; see `render`."""
    sheets, notes = build_sheets(comparison, published)
    parts: list[RenderableType] = []
    for sheet in sheets:
        table = Table(title=Text(sheet.title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, column in enumerate(sheet.columns):
            table.add_column(
                Text(escape_hidden(column)), justify="right" if number else "left", no_wrap=number > 0, overflow="fold"
            )
        for row in sheet.rows:
            if row is None:
                table.add_section()
            else:
                table.add_row(*(_terminal_cell(*cell) for cell in row))
        parts.append(table)
    below = Table.grid(padding=(0, 1))
    for note in notes:
        below.add_row("-", Text(escape_hidden(note)))
    return Group(*parts, below)


def _terminal_cell(main: str, under: str) -> Text:
    text = Text(escape_hidden(main))
    return text.append(f"\n{escape_hidden(under)}", style="dim") if under else text


def _joined(cell: Cell, write: Callable[[str], str]) -> str:
    return " ".join(write(part) for part in cell if part)


def _markdown(sheets: Sequence[Sheet], notes: Sequence[str]) -> str:
    blocks = []
    for sheet in sheets:
        lines = [f"**{escape_markdown(sheet.title)}**", ""]
        lines += [_markdown_row(map(escape_markdown, sheet.columns))]
        lines += [_markdown_row(["---", *["---:"] * (len(sheet.columns) - 1)])]
        lines += [
            _markdown_row(_joined(cell, escape_markdown) for cell in row) for row in sheet.rows if row is not None
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, "\n".join(f"- {escape_markdown(note)}" for note in notes)]) + "\n"


def _markdown_row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def escape_markdown(text: str) -> str:
    """Escape text for GitHub's Markdown, also inside a table; an underscore within a word needs no escape."""
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])|[\\`*\[\]<>|&~$#]", r"\\\g<0>", escape_hidden(text))


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "…": r"\ldots{}",
    "[": "{[}",
    "*": "{*}",
}


def escape_latex(text: str) -> str:
    """Escape text for LaTeX: two hyphens make no dash, and a bracket or star after `\\\\` is not its argument."""
    apart = re.sub("-(?=-)", "-\0", escape_hidden(text))
    return "".join(_LATEX.get(character, character) for character in apart).replace("\0", "{}")


def _latex(sheets: Sequence[Sheet], notes: Sequence[str]) -> str:
    blocks = ["% needs \\usepackage{booktabs} and, for \\textquotedbl, \\usepackage[T1]{fontenc}"]
    for sheet in sheets:
        lines = [f"% {escape_latex(sheet.title)}", f"\\begin{{tabular}}{{l{'r' * (len(sheet.columns) - 1)}}}"]
        lines += ["\\toprule", _latex_row(escape_latex(column) for column in sheet.columns), "\\midrule"]
        for row in sheet.rows:
            lines.append("\\midrule" if row is None else _latex_row(_joined(cell, escape_latex) for cell in row))
        blocks.append("\n".join([*lines, "\\bottomrule", "\\end{tabular}"]))
    return "\n\n".join([*blocks, "\n\n".join(escape_latex(note) for note in notes)]) + "\n"


def _latex_row(cells: Any) -> str:
    return f"{' & '.join(cells)} \\\\"
