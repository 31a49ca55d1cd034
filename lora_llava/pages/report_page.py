"""A run's curves, tables and answers on one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from lora_llava.pages.embedded_image import EmbeddedImage, embed_image
from lora_llava.pages.links import link_to
from lora_llava.pages.render import render
from lora_llava.pages.report_plots import (
    SERIES_COLOURS,
    Curve,
    Drawing,
    describe_cut,
    describe_gaps,
    draw,
    is_drawable,
    write_number,
)

IMAGE_SIZE = 224
"""Pixels of an image's longer side, at most."""
JPEG_QUALITY = 80
_LONG, _START, _END = 320, 150, 90
"""Characters above which a text is folded, and those shown of its start and end, where an answer's letter is."""
_BLANKS = " \t\r\n"  # other spaces are made visible


@dataclass(frozen=True)
class Table:
    """A table of texts and figures.

    Attributes:
        title: Heading above the table.
        columns: Headings; the first is that of the labels.
        rows: Each has as many cells as there are columns.
        groups: The group of each row, shown as a heading above its first row; empty for a table without groups.
        note: A sentence below the heading.
        diagonal: Whether cells on the diagonal behind the labels are emphasised, as in a confusion table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[str] = ()
    note: str = ""
    diagonal: bool = False


@dataclass(frozen=True)
class GalleryItem:
    """A question with the model's answer.

    Attributes:
        question: The question as it was prompted.
        reference: The answer of the data.
        text: The answer of the model.
        right: Whether the answer was scored as right.
        images: Of any size.
        categories: The categories that the question belongs to.
        question_id: Identifies the question.
        names: The images' file names.
        files: Their files, for links; None for an image without one.
    """

    question: str
    reference: str
    text: str
    right: bool
    images: Sequence[Image.Image]
    categories: Sequence[str]
    question_id: str
    names: Sequence[str] = ()
    files: Sequence[Path | None] = ()


@dataclass(frozen=True)
class RunReport:
    """The content of a report.

    Attributes:
        title: Heading.
        facts: Labels and values for the head.
        curves: Plots; the page states where one has no values.
        tables: Tables, such as accuracy by category.
        gallery: Questions and answers; wrong ones are shown first.
        notes: What a reader should know first.
        findings: Sentences above the tables that state what the scores show.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    curves: Sequence[Curve]
    tables: Sequence[Table]
    gallery: Sequence[GalleryItem]
    notes: Sequence[str]
    findings: Sequence[str] = ()


@dataclass(frozen=True)
class _Point:
    step: str
    value: str


@dataclass(frozen=True)
class _Plot:
    """A curve with its drawing, if it has values, and its legend: name, colour, last and kept point of each series."""

    curve: Curve
    drawing: Drawing | None
    legend: Sequence[tuple[str, int, _Point | None, _Point | None]]
    gaps: Sequence[str]
    name: str = ""
    log_drawing: Drawing | None = None


@dataclass(frozen=True)
class _Text:
    """A text, and the start and end that are shown while it is folded."""

    full: str

    @property
    def is_long(self) -> bool:
        return len(self.full) > _LONG

    @property
    def start(self) -> str:
        return self.full[:_START]

    @property
    def end(self) -> str:
        return self.full[-_END:]


@dataclass(frozen=True)
class _Answer:
    """An item as it is shown; `details` are the question's context and options, if any."""

    item: GalleryItem
    images: Sequence[EmbeddedImage]
    links: Sequence[str | None]
    question: _Text
    details: _Text | None
    reference: _Text
    text: _Text


def render_report(report: RunReport, folder: Path | None = None) -> str:
    """Render the page.

    Args:
        report: What to show; its texts may hold anything.
        folder: The folder of the page, from which images' names lead to their files; None for no links.

    Returns:
        One HTML document without scripts. It reaches no network: its Content-Security-Policy allows `data:` images
        and inline styles alone. It can be encoded as UTF-8.

    Raises:
        ValueError: For a table with a row of more or fewer cells than columns.
    """
    for table in report.tables:
        for row in table.rows:
            if len(row) != len(table.columns):
                raise ValueError(f"table {table.title!r} has {len(table.columns)} columns, a row {len(row)} cells")
    right = sum(item.right for item in report.gallery)
    return render(
        "report.html.j2",
        title=report.title,
        report=report,
        plots=[plot_of(curve, f"c{number}") for number, curve in enumerate(report.curves)],
        choices=[("all", len(report.gallery)), ("wrong", len(report.gallery) - right), ("right", right)],
        answers=[_answer(item, folder) for item in sorted(report.gallery, key=lambda item: item.right)],
    )


def plot_of(curve: Curve, prefix: str) -> _Plot:
    """Return a curve as the template `plots.html.j2` shows it.

    Args:
        curve: What to draw.
        prefix: Start of every id.
    """
    legend = [
        (name, number % SERIES_COLOURS, _last_point(points, curve.log_scale), _kept_point(curve, name))
        for number, (name, points) in enumerate(curve.series.items())
    ]
    logarithmic = replace(curve, log_scale=True)
    drawn = draw(logarithmic, f"{prefix}-log") if curve.log_toggle and not curve.log_scale else None
    return _Plot(curve, draw(curve, prefix), legend, [*describe_gaps(curve), *describe_cut(curve)], prefix, drawn)


def _kept_point(curve: Curve, name: str) -> _Point | None:
    kept = curve.kept_point if curve.kept is not None and curve.kept[0] == name else None
    return _Point(step=f"{kept[0]:,g}", value=write_number(kept[1])) if kept is not None else None


def _last_point(points: Sequence[tuple[float, float]], log_scale: bool) -> _Point | None:
    drawn = [point for point in points if is_drawable(point, log_scale)]
    return _Point(step=f"{drawn[-1][0]:,g}", value=write_number(drawn[-1][1])) if drawn else None


def _answer(item: GalleryItem, folder: Path | None) -> _Answer:
    question, line_break, details = item.question.strip(_BLANKS).partition("\n")
    return _Answer(
        item=item,
        images=[embed_image(image, JPEG_QUALITY, IMAGE_SIZE) for image in item.images],
        links=[link_to(file, folder) for file in item.files or [None] * len(item.images)],
        question=_text(question),
        details=_text(details) if line_break else None,
        reference=_text(item.reference),
        text=_text(item.text),
    )


def _text(text: str) -> _Text:
    return _Text(text.strip(_BLANKS))
