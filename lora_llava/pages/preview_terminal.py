"""Samples as they are trained, in the terminal."""

from __future__ import annotations

import itertools

from rich.console import Console
from rich.text import Text

from lora_llava.pages.preview_samples import (
    LINE_BREAK,
    SPACE,
    Preview,
    PreviewRow,
    PreviewToken,
    count_of,
    describe_row,
    escape_hidden,
    share,
)

WIDEST_BAR = 100
_SEGMENTS = "█▓"  # in turn, so that neighbouring samples differ
_PADDING, _UNUSED, _SHARED = "░", "·", "▒"


def print_samples(preview: Preview, console: Console) -> None:
    """Print every sample with its trained tokens marked, then how full the rows are.

    Trained tokens are green in reverse video or, on a console without colour, between ⟦ and ⟧.

    Args:
        preview: What to show; its texts may hold anything, and are printed neither as markup nor as control sequences.
        console: Where to print.

    Raises:
        IndexError: For a sample whose row is not among the rows.
    """
    colour = console.color_system is not None and not console.no_color
    console.print(Text(escape_hidden(preview.title), style="bold"))
    for label, value in preview.facts:
        console.print(Text(escape_hidden(f"{label}: {value}")))
    for index in range(len(preview.samples)):
        console.print()
        console.print(_header(preview, index))
        console.print(_written(preview.samples[index].tokens, colour=colour), overflow="fold")
    if preview.rows:
        console.print()
    for number, row in enumerate(preview.rows):
        console.print(Text(describe_row(preview, number)))
        console.print(Text(_bar(row, min(WIDEST_BAR, console.width))))


def _header(preview: Preview, index: int) -> Text:
    sample = preview.samples[index]
    text = Text(
        escape_hidden(f"{index + 1} of {len(preview.samples)}  {sample.source}  {sample.name or sample.row_id}"),
        style="bold",
    )
    trained = f"{sample.trained:,} trained ({share(sample.trained, sample.length)})"
    images = ": ".join(filter(None, (count_of(len(sample.images), "image"), ", ".join(sample.names))))
    place = describe_row(preview, sample.row).partition(":")[0]
    facts = (
        count_of(sample.length, "token"),
        trained,
        escape_hidden(images),
        place,
        *map(escape_hidden, sample.notes),
    )
    lines = [", ".join(facts), *sample.captions]
    return text.append("\n" + "\n".join(lines), style="not bold dim")


def _written(tokens: tuple[PreviewToken, ...], *, colour: bool) -> Text:
    text = Text()
    open_bracket = False
    for token in tokens:
        if not colour and token.trained != open_bracket:
            text.append("⟦" if token.trained else "⟧")
            open_bracket = token.trained
        written = _piece(token)
        text.append(written, style="bold green reverse" if token.trained else "")
        text.append("\n" * token.newlines)
    return text.append("⟧" if open_bracket else "")


def _piece(token: PreviewToken) -> str:
    if token.is_image:
        return f"<image × {token.count}>"
    if token.text == "<0x0A>":
        return LINE_BREAK
    written = escape_hidden(token.text.replace("\n", LINE_BREAK).replace(SPACE, " "))
    return written + (f" × {token.count}" if token.count > 1 else "")


def _bar(row: PreviewRow, width: int) -> str:
    """Draw a row in `width` characters: its samples in alternating shades, then padding and unused tokens.

    A prefix that samples share is drawn before them.
    """
    shades = itertools.cycle(_SEGMENTS)
    parts = [(length, _SHARED if sample is None else next(shades)) for sample, length in row.parts]
    parts += [(row.padding, _PADDING), (row.unused, _UNUSED)]
    total = max(1, sum(size for size, _ in parts))
    bar, end = "", 0
    for size, shade in parts:
        end += size
        bar += shade * (round(width * end / total) - len(bar))
    return bar
