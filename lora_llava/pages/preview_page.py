"""Samples as they are trained, on one HTML page that needs no other file.

A reader can restore `input_ids` and `labels` from the page: every token is a `span` with its id in `data-id`, the
number of equal ids it stands for in `data-n`, and the class `on` where it is trained.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from PIL import Image

from lora_llava.pages.embedded_image import EmbeddedImage, embed_image
from lora_llava.pages.links import link_to
from lora_llava.pages.preview_samples import (
    LINE_BREAK,
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
from lora_llava.pages.render import render

JPEG_QUALITY = 85
_NUMBERED_SEGMENT = 0.05  # of a row; a number does not fit in less on a phone


@dataclass(frozen=True)
class _Token:
    """A token's box: its text in parts, each with its kind: `plain`, `mark` (of a blank) or `hidden`."""

    id: int
    count: int
    style: str
    title: str
    parts: Sequence[tuple[str, str]]
    newlines: int


@dataclass(frozen=True)
class _Figure:
    """An image of a sample: the symbol to draw, its size in pixels, its file name and address if known, and what is
    seen of it."""

    symbol: str
    width: int
    height: int
    file: str | None
    link: str | None
    caption: str


@dataclass(frozen=True)
class _Segment:
    """A part of a row's bar: a sample with its number, or 0 for what is not a sample of the page."""

    size: int
    title: str
    number: int = 0
    is_numbered: bool = False
    is_current: bool = False
    style: str = ""


@dataclass(frozen=True)
class _Row:
    description: str
    segments: Sequence[_Segment]


@dataclass(frozen=True)
class _Article:
    number: int
    sample: PreviewSample
    trained_share: str
    row: _Row
    tokens: Sequence[_Token]
    figures: Sequence[_Figure]


def render_page(preview: Preview, folder: Path | None = None) -> str:
    """Render the page.

    Args:
        preview: What to show; its texts may hold anything.
        folder: The folder of the page, from which images' names lead to their files; None for no links.

    Returns:
        One HTML document. It reaches no network: its Content-Security-Policy allows `data:` images, inline styles and
        its own script by hash. It can be encoded as UTF-8.

    Raises:
        IndexError: For a sample whose row is not among the rows.
    """
    symbols = _Symbols()
    return render(
        "preview.html.j2",
        title=preview.title,
        facts=preview.facts,
        articles=[_article(preview, index, symbols, folder) for index in range(len(preview.samples))],
        sources=Counter(escape_hidden(sample.source) for sample in preview.samples),
        symbols=symbols.embedded(),
        space=SPACE,
        line_break=LINE_BREAK,
    )


class _Symbols:
    """Images of the page, each distinct one embedded once as an SVG symbol."""

    def __init__(self) -> None:
        self._symbols: dict[bytes, tuple[str, EmbeddedImage]] = {}

    def add(self, image: Image.Image) -> str:
        """Return the name of the image's symbol."""
        key = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        if key not in self._symbols:
            self._symbols[key] = (f"p{len(self._symbols)}", embed_image(image, JPEG_QUALITY))
        return self._symbols[key][0]

    def embedded(self) -> list[tuple[str, EmbeddedImage]]:
        return list(self._symbols.values())


def _article(preview: Preview, index: int, symbols: _Symbols, folder: Path | None) -> _Article:
    sample = preview.samples[index]
    names = sample.names or [None] * len(sample.images)
    links = [link_to(file, folder) for file in sample.files or [None] * len(sample.images)]
    captions = sample.captions or [f"as CLIP gets it, {image.width} × {image.height}" for image in sample.images]
    return _Article(
        number=index + 1,
        sample=sample,
        trained_share=share(sample.trained, sample.length),
        row=_Row(describe_row(preview, sample.row), list(_segments(preview, index))),
        tokens=[_token(token) for token in sample.tokens],
        figures=[
            _Figure(symbols.add(image), *image.size, name, link, caption)
            for image, name, link, caption in zip(sample.images, names, links, captions, strict=True)
        ],
    )


def _segments(preview: Preview, current: int) -> Iterator[_Segment]:
    """Segments of the row that the current sample lies in."""
    row = preview.rows[preview.samples[current].row]
    total = row.used + row.padding + row.unused
    for sample, length in row.parts:
        tokens = count_of(length, "token")
        if sample is None:
            yield _Segment(length, f"image and text that the next samples share, {tokens}", style="shared")
            continue
        if sample < 0:
            yield _Segment(length, f"a sample that is not shown, {tokens}")
            continue
        yield _Segment(
            size=length,
            title=f"sample {sample + 1}, {tokens}",
            number=sample + 1,
            is_numbered=length >= _NUMBERED_SEGMENT * total,
            is_current=sample == current,
        )
    for style, size in (("padding", row.padding), ("unused", row.unused)):
        if size:
            yield _Segment(size, f"{style}, {count_of(size, 'token')}", style=style)


def _token(token: PreviewToken) -> _Token:
    style = "im" if token.is_image else "" if token.trained else "t"
    last = f"-{token.position + token.count - 1}" if token.count > 1 else ""
    trained = "trained" if token.trained else "not trained"
    return _Token(
        id=token.id,
        count=token.count,
        style=f"{style} on".strip() if token.trained else style,
        title=f"id {token.id}, position {token.position}{last}, {trained}: {token.text}",
        parts=[("plain", f"image × {token.count}")] if token.is_image else list(_parts(token)),
        newlines=token.newlines,
    )


def _parts(token: PreviewToken) -> Iterator[tuple[str, str]]:
    """Split a token's text into plain characters, marks of blanks, and hidden characters."""
    if token.text == "<0x0A>":
        yield "mark", LINE_BREAK
        return
    marks = {SPACE: SPACE, " ": "␣", "\n": LINE_BREAK}
    for kind, characters in groupby(
        token.text, lambda c: "mark" if c in marks else "hidden" if is_hidden(c) else "plain"
    ):
        if kind == "plain":
            yield kind, "".join(characters)
        else:
            yield from ((kind, marks.get(character, character)) for character in characters)
    if token.count > 1:
        yield "plain", f" × {token.count}"
