"""Samples as they are trained, on one HTML page that needs nothing else.

A reader can take `input_ids` and `labels` back from the page: every token is a `span` with its id in `data-id`, how
many equal ids it stands for in `data-n`, and the class `on` where it is trained.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from html import escape
from importlib import resources

from PIL import Image

from lora_llava.pages.html_page import escape_line, write_page
from lora_llava.pages.preview_samples import (
    NEWLINE,
    SPACE,
    Preview,
    PreviewSample,
    PreviewToken,
    count_of,
    describe_row,
    escape_hidden,
    is_hidden,
    share,
)

JPEG_QUALITY = 85
_SMALL = 128 * 128
"""Pixels up to which an image is kept as PNG: JPEG's traces would show where few pixels are drawn large."""
_NUMBERED_SEGMENT = 0.05  # of a row; a number does not fit in less on a phone


def render_page(preview: Preview) -> str:
    """Write the page.

    Args:
        preview: What to show; its texts may hold anything.

    Returns:
        One HTML document. It reaches no network: its Content-Security-Policy allows `data:` images, inline styles and
        its own script by hash. It can be encoded as UTF-8.

    Raises:
        IndexError: For a sample whose row is not among the rows.
    """
    style, script = _asset("preview_page.css"), _asset("preview_page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    definitions, names = _embed_images(preview.samples)
    articles = "\n".join(_article(preview, index, names[index]) for index in range(len(preview.samples)))
    main = articles or "<p>There are no samples.</p>"
    body = f"{definitions}\n{_head(preview)}\n{_toolbar(preview.samples)}\n<main>\n{main}\n</main>"
    return write_page(preview.title, style, body, policy, script)


def _asset(name: str) -> str:
    return resources.files("lora_llava.pages").joinpath(name).read_text(encoding="utf-8")


def _embed_images(samples: Sequence[PreviewSample]) -> tuple[str, list[list[str]]]:
    """The images as SVG symbols, each distinct one once, and the symbols' names for every sample."""
    symbols: dict[bytes, tuple[str, str]] = {}
    names: list[list[str]] = []
    for sample in samples:
        names.append([])
        for image in sample.images:
            key = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
            if key not in symbols:
                symbols[key] = _symbol(f"p{len(symbols)}", image)
            names[-1].append(symbols[key][0])
    drawn = "\n".join(symbol for _, symbol in symbols.values())
    return f'<svg class="store" aria-hidden="true">{drawn}</svg>', names


def _symbol(name: str, image: Image.Image) -> tuple[str, str]:
    stream = io.BytesIO()
    width, height = image.size
    kind = "png" if width * height <= _SMALL else "jpeg"
    image.convert("RGB").save(stream, kind.upper(), quality=JPEG_QUALITY, optimize=True)
    data = base64.b64encode(stream.getvalue()).decode()
    element = f'<image width="{width}" height="{height}" href="data:image/{kind};base64,{data}"/>'
    return name, f'<symbol id="{name}" viewBox="0 0 {width} {height}">{element}</symbol>'


def _head(preview: Preview) -> str:
    facts = "".join(
        f"<div><dt>{escape_line(label)}</dt><dd>{escape_line(value)}</dd></div>" for label, value in preview.facts
    )
    return (
        f"<header><h1>{escape_line(preview.title)}</h1><dl>{facts}</dl>"
        '<ul class="legend"><li><span class="on">trained</span> the loss is taken on it</li>'
        '<li><span class="t">read</span> context only</li>'
        '<li><span class="im">image</span> positions of an image</li>'
        f"<li><span class='t'><i>{SPACE}</i></span> space</li><li><span class='t'><i>{NEWLINE}</i></span> new line</li>"
        "</ul></header>"
    )


def _toolbar(samples: Sequence[PreviewSample]) -> str:
    sources = Counter(escape_hidden(sample.source) for sample in samples)
    options = "".join(
        f'<option value="{escape(source)}">{escape(source)} ({count:,})</option>' for source, count in sources.items()
    )
    # Sources are told from "all" by its lack of a value, as a source can have any name, the empty one too.
    return (
        '<nav aria-label="Samples"><button id="previous" type="button" title="Left arrow key">← Previous</button>'
        f'<output id="place" aria-live="polite">1 of {len(samples)}</output>'
        '<button id="next" type="button" title="Right arrow key">Next →</button>'
        f'<label>Source <select id="source"><option data-all>all ({len(samples):,})</option>{options}</select></label>'
        "</nav>"
    )


def _article(preview: Preview, index: int, images: Sequence[str]) -> str:
    sample = preview.samples[index]
    source, row_id = escape_line(sample.source), escape_line(sample.row_id)
    name = escape_line(sample.name) or row_id
    notes = "".join(f"<li>{escape_line(note)}</li>" for note in sample.notes)
    figures = (
        ("tokens", f"{sample.length:,}"),
        ("trained", f"{sample.trained:,} <small>{share(sample.trained, sample.length)}</small>"),
        ("images", str(len(sample.images))),
    )
    return (
        f'<article id="{index + 1}" data-row-id="{row_id}" data-source="{source}">'
        f'<div class="top"><div><p class="source">sample {index + 1} · <bdi>{source}</bdi></p><h2>{name}</h2></div>'
        '<dl class="figures">'
        + "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in figures)
        + "</dl></div>"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + _row(preview, index)
        + f'<div class="body"><p class="tokens">{"".join(map(_token, sample.tokens))}</p>'
        + _images(sample, images)
        + "</div></article>"
    )


def _images(sample: PreviewSample, names: Sequence[str]) -> str:
    if not sample.images:
        return ""
    figures = ""
    files = [f"<bdi>{escape_line(file)}</bdi>, " for file in sample.names] or [""] * len(names)
    for number, (image, name, file) in enumerate(zip(sample.images, names, files, strict=True), 1):
        width, height = image.size
        figures += (
            f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="Image {number}">'
            f'<use href="#{name}" width="{width}" height="{height}"/></svg>'
            f"<figcaption>{file}as CLIP gets it, {width} × {height}</figcaption></figure>"
        )
    return f'<div class="images">{figures}</div>'


def _row(preview: Preview, current: int) -> str:
    """The bar of the row that the current sample lies in."""
    number = preview.samples[current].row
    row = preview.rows[number]
    total = sum(row.lengths) + row.padding + row.unused
    bar = ""
    for sample, length in zip(row.samples, row.lengths, strict=True):
        text = str(sample + 1) if sample >= 0 and length >= _NUMBERED_SEGMENT * total else ""
        style = f'style="flex-grow:{length}"'
        if sample < 0:
            bar += f'<b {style} title="a sample that is not shown, {count_of(length, "token")}"></b>'
            continue
        here = ' aria-current="true"' if sample == current else ""
        title = f"sample {sample + 1}, {count_of(length, 'token')}"
        bar += f'<a href="#{sample + 1}" {style}{here} title="{title}" aria-label="{title}">{text}</a>'
    for name, size in (("padding", row.padding), ("unused", row.unused)):
        if size:
            bar += f'<b class="{name}" style="flex-grow:{size}" title="{name}, {count_of(size, "token")}"></b>'
    return f'<div class="row"><p>{describe_row(preview, number)}</p><div class="bar">{bar}</div></div>'


def _token(token: PreviewToken) -> str:
    kind = "im" if token.is_image else "" if token.trained else "t"
    kind = f"{kind} on".strip() if token.trained else kind
    last = f"-{token.position + token.count - 1}" if token.count > 1 else ""
    trained = "trained" if token.trained else "not trained"
    title = f"id {token.id}, position {token.position}{last}, {trained}: {escape_line(token.text)}"
    shown = f"image × {token.count}" if token.is_image else _piece(token)
    box = f'<span class="{kind}" data-id="{token.id}" data-n="{token.count}" title="{title}">{shown}</span>'
    return box + "<br>" * token.newlines


def _piece(token: PreviewToken) -> str:
    if token.text == "<0x0A>":
        return f"<i>{NEWLINE}</i>"
    shown = ""
    for character in token.text:
        if character in (SPACE, " "):
            shown += f"<i>{SPACE if character == SPACE else '␣'}</i>"
        elif character == "\n":
            shown += f"<i>{NEWLINE}</i>"
        elif is_hidden(character):
            shown += f"<b>{escape_hidden(character)}</b>"
        else:
            shown += escape(character)
    return shown + (f" × {token.count}" if token.count > 1 else "")
