"""Curves of a run as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

SERIES_COLOURS = 4
"""Colours that the page has; a fifth series takes the first one's."""
_FEW = 16
"""Points up to which each is marked."""
_MOST = 1e100
"""Numbers with which ticks and margins can still be reckoned in floats."""
# Colours of the drawing that the page's own stand for; matplotlib writes them as they are into `style`.
_INK, _GRID = "#000001", "#000002"
_SERIES = [f"#00001{number}" for number in range(SERIES_COLOURS)]
_VARIABLES = {_INK: "--soft", _GRID: "--line", **{colour: f"--series-{n}" for n, colour in enumerate(_SERIES)}}
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "lora_llava", "text.parse_math": False, "font.size": 8,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": _GRID, "axes.labelcolor": _INK, "xtick.color": _GRID, "ytick.color": _GRID, "text.color": _INK,
    "xtick.labelcolor": _INK, "ytick.labelcolor": _INK, "grid.color": _GRID, "grid.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
}  # fmt: skip

Points = list[tuple[float, float]]
"""Pairs of step and value."""


@dataclass(frozen=True)
class Curve:
    """One plot.

    Attributes:
        title: Stands above.
        unit: Of the values, "" for none.
        series: Points by name, in the order of their steps.
        log_scale: Draw the values on a logarithmic scale.
    """

    title: str
    unit: str
    series: dict[str, Points]
    log_scale: bool = False


def is_drawable(point: tuple[float, float], log_scale: bool) -> bool:
    """Whether a point has a place in the plot: finite, not beyond all measure, above zero on a logarithmic scale."""
    step, value = point
    return abs(step) < _MOST and abs(value) < _MOST and (value > 1 / _MOST or not log_scale)  # false for NaN


def left_out(curve: Curve) -> list[str]:
    """What is said of the values that have no place in a plot.

    Args:
        curve: A plot.

    Returns:
        A sentence a series that has such.
    """
    told = []
    for name, points in curve.series.items():
        gone = [point for point in points if not is_drawable(point, curve.log_scale)]
        if gone:
            step, value = gone[0]
            what = "value is a gap" if len(gone) == 1 else "values are gaps"
            first = "NaN" if math.isnan(value) else f"{value:g}"
            told.append(f"{name}: {len(gone):,} {what}, the first {first} at step {step:g}")
    return told


def draw(curve: Curve, prefix: str) -> str:
    """Draw a plot.

    Args:
        curve: What to draw; of its texts none is written into the drawing.
        prefix: Begins every id, so that several drawings can stand in one page.

    Returns:
        An `svg` element, the same for the same curve, with text as text and no colour but the page's custom properties
        `--soft`, `--line` and `--series-0` to `--series-3`; or "" where there is nothing to draw.
    """
    drawn = [point for points in curve.series.values() for point in points if is_drawable(point, curve.log_scale)]
    if not drawn:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.5, 2.1), layout="constrained")
        axes = figure.add_subplot()
        for number, points in enumerate(curve.series.values()):
            _plot(axes, points, curve.log_scale, _SERIES[number % SERIES_COLOURS])
        _scale(axes, curve.log_scale, *np.min(drawn, axis=0))
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return _for_page(stream.getvalue(), prefix)


def _plot(axes: matplotlib.axes.Axes, points: Points, log_scale: bool, colour: str) -> None:
    drawn = np.array([point if is_drawable(point, log_scale) else (np.nan, np.nan) for point in points]).reshape(-1, 2)
    there = np.concatenate(([False], np.isfinite(drawn[:, 0]), [False]))
    alone = np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:])  # no line leads to these
    marked = range(len(points)) if len(points) <= _FEW else alone.tolist()
    axes.plot(*drawn.T, color=colour, linewidth=1.5, marker="o", markersize=3.5, markevery=list(marked))


def _scale(axes: matplotlib.axes.Axes, log_scale: bool, first_step: float, lowest: float) -> None:
    """Axes from zero where nothing is below it: a part of an axis would make little of much, and much of little."""
    axes.grid(axis="y")
    axes.tick_params(length=0, pad=5, which="both")
    axes.margins(x=0.015)
    if first_step >= 0:
        axes.set_xlim(left=0)
    if log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if lowest >= 0:
            axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(lambda value, place: write_number(value))
    axes.yaxis.set_major_formatter(lambda value, place: write_number(value))


def write_number(value: float) -> str:
    """A number to four digits, or whole from a thousand on."""
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e9 else f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e+")


def _for_page(svg: str, prefix: str) -> str:
    """The `svg` element alone, to scale, its ids told from other drawings', its colours the page's."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # it would style the whole page
    view_box = re.search(r'viewBox="[^"]*"', svg)
    svg = f"<svg {view_box[0] if view_box else ''}>{svg[svg.index('>') + 1 :]}".replace("xlink:href", "href")
    svg = re.sub(r'( id="|="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", svg)
