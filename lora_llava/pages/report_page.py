"""A run's curves, tables and answers on one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from PIL import Image

from lora_llava.pages.html_page import escape_line, escape_lines, write_page
from lora_llava.pages.preview_samples import count_of
from lora_llava.pages.report_plots import SERIES_COLOURS, Curve, draw, is_drawable, left_out, write_number

IMAGE_SIZE = 224
"""Pixels of an image's longer side, at most."""
JPEG_QUALITY = 80
_SMALL = 128 * 128
"""Pixels up to which an image is kept as PNG: JPEG's traces would show where few pixels are drawn large."""
_LONG, _START, _END = 320, 150, 90
"""Letters above which a text is folded, and those that are shown of it: an answer's letter stands at its end."""
_BLANKS = " \t\r\n"  # other spaces are written out


@dataclass(frozen=True)
class Table:
    """A table of words and figures.

    Attributes:
        title: Stands above.
        columns: Headings, the first that of the labels.
        rows: As many cells each.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class GalleryItem:
    """A question that was asked.

    Attributes:
        question: As it was asked.
        reference: What the data answers.
        text: What the model wrote.
        right: How the answer was marked.
        images: Of any size.
        categories: That it counts in.
        question_id: Its name.
        names: The images' file names.
    """

    question: str
    reference: str
    text: str
    right: bool
    images: Sequence[Image.Image]
    categories: Sequence[str]
    question_id: str
    names: Sequence[str] = ()


@dataclass(frozen=True)
class RunReport:
    """What is shown.

    Attributes:
        title: Heading.
        facts: Labels and values for the head.
        curves: Plots; one without a point says so.
        tables: Tables, such as accuracy by category.
        gallery: Questions and answers; wrong ones are shown first.
        notes: What a reader should know before all else.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    curves: Sequence[Curve]
    tables: Sequence[Table]
    gallery: Sequence[GalleryItem]
    notes: Sequence[str]


def render_report(report: RunReport) -> str:
    """Write the page.

    Args:
        report: What to show; its texts may hold anything.

    Returns:
        One HTML document without scripts. It reaches no network: its Content-Security-Policy allows `data:` images
        and inline styles alone. It can be encoded as UTF-8.

    Raises:
        ValueError: For a table with a row of more or fewer cells than columns.
    """
    style = resources.files("lora_llava.pages").joinpath("report_page.css").read_text(encoding="utf-8")
    body = "\n".join(part for part in (_head(report), _tables(report), _curves(report), _gallery(report)) if part)
    return write_page(report.title, style, body)


def _head(report: RunReport) -> str:
    facts = "".join(
        f"<div><dt>{escape_line(label)}</dt><dd>{escape_line(value)}</dd></div>" for label, value in report.facts
    )
    notes = "".join(f"<li>{escape_line(note)}</li>" for note in report.notes)
    return (
        f"<header><h1>{escape_line(report.title)}</h1>"
        + (f"<dl>{facts}</dl>" if facts else "")
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + "</header>"
    )


def _tables(report: RunReport) -> str:
    drawn = "".join(f'<section class="card">{_table(table)}</section>' for table in report.tables)
    return f'<main class="tables">{drawn}</main>' if drawn else ""


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape_line(column)}</th>' for column in table.columns)
    body = ""
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"table {table.title!r} has {len(table.columns)} columns, a row {len(row)} cells")
        label, *values = (escape_line(cell) for cell in row)
        body += f'<tr><th scope="row">{label}</th>' + "".join(f"<td>{value}</td>" for value in values) + "</tr>"
    return (
        f'<h2>{escape_line(table.title)}</h2><div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _curves(report: RunReport) -> str:
    drawn = "".join(_curve(curve, f"c{number}") for number, curve in enumerate(report.curves))
    return f'<section class="curves">{drawn}</section>' if drawn else ""


def _curve(curve: Curve, prefix: str) -> str:
    title = escape_line(curve.title)
    unit = f" <small>{escape_line(curve.unit)}</small>" if curve.unit else ""
    scale = " <small>logarithmic</small>" if curve.log_scale else ""
    svg = draw(curve, prefix).replace("<svg ", f'<svg role="img" aria-label="{title} by step" ', 1)
    legend = ""
    for number, (name, points) in enumerate(curve.series.items()):
        there = [point for point in points if is_drawable(point, curve.log_scale)]
        last = f"<b>{write_number(there[-1][1])}</b> at step {there[-1][0]:,g}" if there else "no value"
        swatch = f'<span class="swatch s{number % SERIES_COLOURS}"></span>'
        legend += f"<li>{swatch}<bdi>{escape_line(name)}</bdi>&ensp;{last}</li>"
    told = "".join(f'<p class="note">{escape_line(sentence)}</p>' for sentence in left_out(curve))
    return (
        f'<figure class="card"><figcaption><h2>{title}{unit}{scale}</h2></figcaption>'
        + (svg or '<p class="none">no values</p>')
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + f"{told}</figure>"
    )


def _gallery(report: RunReport) -> str:
    if not report.gallery:
        return ""
    right = sum(item.right for item in report.gallery)
    shown = {"all": len(report.gallery), "wrong": len(report.gallery) - right, "right": right}
    choices = "".join(
        f'<input type="radio" name="show" id="show-{name}"{" checked" * (name == "all")}>'
        f'<label for="show-{name}">{name} <span>{count:,}</span></label>'
        for name, count in shown.items()
    )
    items = sorted(report.gallery, key=lambda item: item.right)
    return (
        f'<section class="answers"><h2>Answers</h2>{choices}<div class="items">'
        + "\n".join(map(_item, items))
        + "</div></section>"
    )


def _item(item: GalleryItem) -> str:
    kind = "right" if item.right else "wrong"
    images = "".join(
        f'<img src="{_data_uri(image)}" alt="image {number} of question {escape_line(item.question_id)}">'
        + (f'<p class="file"><bdi>{escape_line(item.names[number - 1])}</bdi></p>' if item.names else "")
        for number, image in enumerate(item.images, 1)
    )
    categories = "".join(f"<li>{escape_line(name)}</li>" for name in item.categories)
    return (
        f'<article class="card {kind}"><div class="top"><span class="mark">{kind}</span>'
        f'<bdi class="id">{escape_line(item.question_id)}</bdi><ul>{categories}</ul></div><div class="body">'
        + (f'<div class="images" title="{count_of(len(item.images), "image")}">{images}</div>' if images else "")
        + f'<div class="texts">{_question(item.question)}<dl>'
        f'<dt>reference</dt><dd>{_text(item.reference)}</dd><dt>answer</dt><dd class="answer">{_text(item.text)}</dd>'
        "</dl></div></div></article>"
    )


def _question(text: str) -> str:
    """A question, its context and options, if any, on lines of their own."""
    asked, line_break, rest = text.strip(_BLANKS).partition("\n")
    return f'<div class="question">{_text(asked)}</div>' + (_text(rest) if line_break else "")


def _text(text: str) -> str:
    """A text, folded where it is long."""
    text = text.strip(_BLANKS)
    if not text:
        return '<p class="text none">nothing</p>'
    whole = f'<p class="text" dir="auto">{escape_lines(text)}</p>'
    if len(text) <= _LONG:
        return whole
    cut = f"{escape_lines(text[:_START])} … {escape_lines(text[-_END:])}"
    return f'<details><summary><span class="text cut" dir="auto">{cut}</span></summary>{whole}</details>'


def _data_uri(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((IMAGE_SIZE, IMAGE_SIZE))
    kind = "png" if small.width * small.height <= _SMALL else "jpeg"
    stream = io.BytesIO()
    small.save(stream, kind.upper(), quality=JPEG_QUALITY, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
