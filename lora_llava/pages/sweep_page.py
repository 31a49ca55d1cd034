"""The page of a sweep: its tables, the spread over seeds, and the validation curves of the best settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_llava.pages.render import render
from lora_llava.pages.report_page import Table, plot_of
from lora_llava.pages.report_plots import INK, SERIES, STYLE, Curve, Drawing, for_page, write_number

_ROW = 0.28
"""Inches between two settings."""


@dataclass(frozen=True)
class Spread:
    """The values of each setting's runs.

    Attributes:
        title: Name of the value.
        values: A list for each setting, in the order of the table.
    """

    title: str
    values: Sequence[Sequence[float]]


@dataclass(frozen=True)
class SweepPage:
    """The content of the page.

    Attributes:
        title: Heading.
        facts: Labels and values for the head.
        notes: What a reader should know first.
        tables: Tables.
        spread: The values of each setting's runs.
        curve: The curves of the best settings.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    tables: Sequence[Table]
    spread: Spread
    curve: Curve


def render_sweep(page: SweepPage) -> str:
    """Render the page.

    Args:
        page: What to show; its texts may hold anything.

    Returns:
        One HTML document without scripts that reaches no network.
    """
    return render(
        "sweep.html.j2",
        title=page.title,
        page=page,
        spread=draw_spread(page.spread, "spread"),
        plot=plot_of(page.curve, "curve"),
    )


def draw_spread(spread: Spread, prefix: str) -> Drawing | None:
    """Draw each setting's runs as dots, with their mean and a line of one standard deviation to both sides.

    Args:
        spread: What to draw; its settings are numbered from the top as in the table.
        prefix: Start of every id.

    Returns:
        The drawing; None without a finite value.
    """
    rows = [[value for value in values if math.isfinite(value)] for values in spread.values]
    if not any(rows):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.5, 0.6 + _ROW * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for number, values in enumerate(rows, start=1):
            axes.plot(values, [number] * len(values), "o", color=SERIES[0], markersize=3.5, linestyle="none")
            if values:
                mean, deviation = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0
                axes.plot([mean - deviation, mean + deviation], [number] * 2, color=INK, linewidth=1)
                axes.plot(mean, number, "|", color=INK, markersize=9)
        axes.grid(axis="x")
        axes.tick_params(length=0, pad=5)
        axes.set_ylim(len(rows) + 0.5, 0.5)
        axes.set_yticks(range(1, len(rows) + 1))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda value, place: write_number(value))
        return for_page(figure, prefix)
