"""Curves of a run as SVG drawings in the colours of the page."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

SERIES_COLOURS = 4
"""Colours that the page has; a fifth series gets the first one's."""
_FEW = 16
"""Most points of a series whose points are all marked."""
_MOST = 1e100
"""Bound of the numbers for which ticks and margins can be computed in floats."""
# Placeholders for the page's own colours; matplotlib writes them into `style` unchanged.
_INK, _GRID = "#000001", "#000002"
_SERIES = [f"#00001{number}" for number in range(SERIES_COLOURS)]
_VARIABLES = {_INK: "--soft", _GRID: "--line", **{colour: f"--series-{n}" for n, colour in enumerate(_SERIES)}}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lora_llava",
    "text.parse_math": False,
    "text.color": _INK,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.color": _GRID,
    "ytick.labelcolor": _INK,
}

Points = list[tuple[float, float]]
"""Pairs of step and value."""


@dataclass(frozen=True)
class Curve:
    """One plot.

    Attributes:
        title: Heading above the plot.
        unit: Of the values; "" for none.
        series: Points by name, in the order of their steps.
        log_scale: Draw the values on a logarithmic scale.
    """

    title: str
    unit: str
    series: dict[str, Points]
    log_scale: bool = False


@dataclass(frozen=True)
class Drawing:
    """A plot as SVG.

    Attributes:
        view_box: The `svg` element's `viewBox`.
        content: What is inside the `svg` element.
    """

    view_box: str
    content: Markup


def is_drawable(point: tuple[float, float], log_scale: bool) -> bool:
    """Check whether a point can be drawn: finite, within bounds, and above zero on a logarithmic scale."""
    step, value = point
    return abs(step) < _MOST and abs(value) < _MOST and (value > 1 / _MOST or not log_scale)  # false for NaN


def describe_gaps(curve: Curve) -> list[str]:
    """Describe the values that cannot be drawn.

    Args:
        curve: A plot.

    Returns:
        A sentence for each series that has such values.
    """
    sentences = []
    for name, points in curve.series.items():
        gaps = [point for point in points if not is_drawable(point, curve.log_scale)]
        if gaps:
            step, value = gaps[0]
            what = "value is a gap" if len(gaps) == 1 else "values are gaps"
            first = "NaN" if math.isnan(value) else f"{value:g}"
            sentences.append(f"{name}: {len(gaps):,} {what}, the first {first} at step {step:g}")
    return sentences


def draw(curve: Curve, prefix: str) -> Drawing | None:
    """Draw a plot.

    Args:
        curve: What to draw; none of its texts is written into the drawing.
        prefix: Start of every id, so that one page can hold several drawings.

    Returns:
        A drawing, the same for the same curve, with text as text and no colours but the page's custom properties
        `--soft`, `--line` and `--series-0` to `--series-3`; None where no point can be drawn.
    """
    drawn = [point for points in curve.series.values() for point in points if is_drawable(point, curve.log_scale)]
    if not drawn:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.5, 2.1), layout="constrained")
        axes = figure.add_subplot()
        for number, points in enumerate(curve.series.values()):
            _plot(axes, points, curve.log_scale, _SERIES[number % SERIES_COLOURS])
        _scale(axes, curve.log_scale, *np.min(drawn, axis=0))
        stream = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=no_metadata)
    return _for_page(stream.getvalue(), prefix)


def _plot(axes: matplotlib.axes.Axes, points: Points, log_scale: bool, colour: str) -> None:
    drawn = np.array([point if is_drawable(point, log_scale) else (np.nan, np.nan) for point in points]).reshape(-1, 2)
    is_drawn = np.concatenate(([False], np.isfinite(drawn[:, 0]), [False]))
    alone = np.flatnonzero(is_drawn[1:-1] & ~is_drawn[:-2] & ~is_drawn[2:])  # no line leads to these
    marked = range(len(points)) if len(points) <= _FEW else alone.tolist()
    axes.plot(*drawn.T, color=colour, linewidth=1.5, marker="o", markersize=3.5, markevery=list(marked))


def _scale(axes: matplotlib.axes.Axes, log_scale: bool, first_step: float, lowest: float) -> None:
    """Start the axes at zero unless a value is below it: a cut axis would exaggerate small differences."""
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
    """Write a number with four digits, or without decimals from a thousand on."""
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e9 else f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e+")


def _for_page(svg: str, prefix: str) -> Drawing:
    """Keep the inside of the `svg` element, make its ids unique on the page, and use the page's colours."""
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # it would style the whole page
    element = re.search(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>(.*)</svg>', svg, re.DOTALL)
    assert element is not None
    view_box, content = element.groups()
    content = content.replace("xlink:href", "href")
    content = re.sub(r'( id="|="#|url\(#)', rf"\g<1>{prefix}-", content)
    for colour, variable in _VARIABLES.items():
        content = content.replace(colour, f"var({variable})")
    return Drawing(view_box, Markup(re.sub(r"\n\s*", "\n", content)))  # matplotlib escapes the tick labels
