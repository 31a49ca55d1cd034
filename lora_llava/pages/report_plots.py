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
_FIRST, _USUAL, _HEADROOM, _FAR = 3, 0.98, 1.25, 1.6
"""A robust axis ends at 1.25 times the 98% quantile without each series' first 3 values (or 5% of them), if the highest
value is above 1.6 times that; untuned."""
_MOST = 1e100
"""Bound of the numbers for which ticks and margins can be computed in floats."""
# Placeholders for the page's own colours; matplotlib writes them into `style` unchanged.
INK, GRID = "#000001", "#000002"
SERIES = [f"#00001{number}" for number in range(SERIES_COLOURS)]
_VARIABLES = {INK: "--soft", GRID: "--line", **{colour: f"--series-{n}" for n, colour in enumerate(SERIES)}}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lora_llava",
    "text.parse_math": False,
    "text.color": INK,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.color": GRID,
    "ytick.labelcolor": INK,
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
    robust: bool = False
    """Cut the axis above the usual values, so that a few large ones, such as the first, do not flatten the others."""
    log_toggle: bool = False
    """Let the reader change to a logarithmic scale."""
    kept: tuple[str, float] | None = None
    """The series and step of the checkpoint kept, which is ringed."""

    @property
    def kept_point(self) -> tuple[float, float] | None:
        """The step and value of the checkpoint kept."""
        points = self.series.get(self.kept[0], []) if self.kept else []
        return next((point for point in points if self.kept and point[0] == self.kept[1]), None)


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


def axis_limit(curve: Curve) -> float | None:
    """Return where the axis of a robust plot is cut.

    Args:
        curve: A plot.

    Returns:
        A value above nearly all values but the first of each series; None where no value is far above it.
    """
    drawn = [[point[1] for point in points if is_drawable(point, False)] for points in curve.series.values()]
    every = [value for values in drawn for value in values]
    if not curve.robust or curve.log_scale or not every or min(every) < 0:
        return None
    later = [value for values in drawn for value in values[_first(len(values)) :]]
    limit = _HEADROOM * float(np.quantile(later, _USUAL))
    if curve.kept_point is not None:
        limit = max(limit, _HEADROOM * curve.kept_point[1])
    return limit if max(every) > _FAR * limit else None


def _first(count: int) -> int:
    """Return how many values at the start of a series do not set the axis."""
    return 0 if count < 2 * _FIRST else max(_FIRST, count // 20)


def describe_cut(curve: Curve) -> list[str]:
    """Describe the values above a cut axis.

    Args:
        curve: A plot.

    Returns:
        A sentence for each series that has such values.
    """
    limit, sentences = axis_limit(curve), []
    for name, points in curve.series.items() if limit is not None else ():
        above = [point for point in points if is_drawable(point, False) and point[1] > (limit or 0)]
        if above:
            step, value = max(above, key=lambda point: point[1])
            what = "1 value is" if len(above) == 1 else f"{len(above):,} values are"
            highest = f"{write_number(value)} at step {step:g}"
            log = "; the logarithmic scale shows all" if curve.log_toggle else ""
            sentences.append(f"{name}: {what} above the axis, the highest {highest}{log}")
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
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.5, 2.1), layout="constrained")
        axes = figure.add_subplot()
        for number, points in enumerate(curve.series.values()):
            _plot(axes, points, curve.log_scale, SERIES[number % SERIES_COLOURS])
        if (kept := curve.kept_point) is not None and is_drawable(kept, curve.log_scale):
            axes.plot(*kept, color=INK, marker="o", markersize=9, fillstyle="none", clip_on=False)
        _scale(axes, curve.log_scale, *np.min(drawn, axis=0))
        if (limit := axis_limit(curve)) is not None:
            axes.set_ylim(top=limit)
        return for_page(figure, prefix)


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


def for_page(figure: Figure, prefix: str) -> Drawing:
    """Write a figure as the inside of an `svg` element, with ids unique on the page and the page's colours.

    Args:
        figure: Drawn under `STYLE`, in `INK`, `GRID` and `SERIES`.
        prefix: Start of every id.
    """
    stream = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=no_metadata)
    svg = stream.getvalue()
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # it would style the whole page
    element = re.search(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>(.*)</svg>', svg, re.DOTALL)
    assert element is not None
    view_box, content = element.groups()
    content = content.replace("xlink:href", "href")
    content = re.sub(r'( id="|="#|url\(#)', rf"\g<1>{prefix}-", content)
    for colour, variable in _VARIABLES.items():
        content = content.replace(colour, f"var({variable})")
    return Drawing(view_box, Markup(re.sub(r"\n\s*", "\n", content)))  # matplotlib escapes the tick labels
