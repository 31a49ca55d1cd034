"""Content of a preview: samples as they are trained, their rows, and helpers that write both as text."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

SPACE = "▁"
"""SentencePiece's mark of a space."""
LINE_BREAK = "⏎"
"""How a preview shows a line break."""
_BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # letters and marks in Unicode, but drawn as nothing


@dataclass(frozen=True)
class PreviewToken:
    """A token, or a run of image positions.

    Attributes:
        id: Token id.
        text: The tokenizer's own piece, such as `▁dog` or `<0x0A>`.
        trained: Whether the loss is computed on it.
        position: Index of its first id in the sample's `input_ids`.
        count: Number of equal ids that it stands for; more than 1 only for image positions.
        is_image: Whether features of the image replace it.
    """

    id: int
    text: str
    trained: bool
    position: int
    count: int = 1
    is_image: bool = False

    @property
    def newlines(self) -> int:
        """Number of line breaks in the piece."""
        return 1 if self.text == "<0x0A>" else self.text.count("\n")


@dataclass(frozen=True)
class PreviewSample:
    """One sample.

    Attributes:
        source: Name of its dataset or file.
        row_id: Its id in the source.
        tokens: All of them, in order.
        images: RGB images as CLIP gets them, in the order of the placeholders; for a model with tiles, each with its
            tiles beside it.
        row: Index of its row.
        notes: What a reader should know about it, such as "answer cut to fit".
        name: How messages name the row; "" where only the id is known.
        names: The images' file names.
        files: Their files, for links; None for an image without one.
        captions: What is seen of each image, for a model with tiles.
    """

    source: str
    row_id: str
    tokens: tuple[PreviewToken, ...]
    images: tuple[Image.Image, ...]
    row: int
    notes: tuple[str, ...] = ()
    name: str = ""
    names: tuple[str, ...] = ()
    files: tuple[Path | None, ...] = ()
    captions: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Number of tokens, image positions included."""
        return sum(token.count for token in self.tokens)

    @property
    def trained(self) -> int:
        """Number of tokens that the loss is computed on."""
        return sum(token.count for token in self.tokens if token.trained)


@dataclass(frozen=True)
class PreviewRow:
    """A row of a batch: one packed row, or one sample and its padding.

    Attributes:
        samples: Indices into the preview's samples, in order; -1 for a sample that is not shown.
        lengths: Number of tokens of each, without a prefix that it shares.
        capacity: The row's token budget; 0 for none.
        padding: Number of padding tokens.
        prefixes: Number of tokens of the shared prefix that begins before each sample; 0 if none begins. Empty if
            nothing is shared.
    """

    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    capacity: int
    padding: int = 0
    prefixes: tuple[int, ...] = ()

    @property
    def used(self) -> int:
        """Number of tokens, without padding; a shared prefix is counted once."""
        return sum(self.lengths) + sum(self.prefixes)

    @property
    def parts(self) -> Iterator[tuple[int | None, int]]:
        """Each sample and its tokens, in order; None and the tokens of a prefix before those that share it."""
        prefixes = self.prefixes or (0,) * len(self.lengths)
        for sample, length, prefix in zip(self.samples, self.lengths, prefixes, strict=True):
            if prefix:
                yield None, prefix
            yield sample, length

    @property
    def unused(self) -> int:
        """Number of tokens of the budget that are not used."""
        return max(0, self.capacity - self.used - self.padding)


@dataclass(frozen=True)
class Preview:
    """The content of a preview.

    Attributes:
        title: Heading.
        facts: Labels and values for the head, such as the recipe and the template.
        samples: In the order in which they are shown.
        rows: The samples' rows.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    samples: tuple[PreviewSample, ...]
    rows: tuple[PreviewRow, ...]


@lru_cache(maxsize=4096)
def is_hidden(character: str) -> bool:
    """Check whether a character is invisible or changes how its neighbours are drawn.

    Args:
        character: One character.

    Returns:
        True for control, format and bidi characters, lone surrogates, unassigned and private-use characters, every
        space and line break except the plain space, and characters that are drawn as nothing.
    """
    if character == " ":
        return False
    return (
        unicodedata.category(character)[0] in "CZ"
        or character in _BLANK
        or unicodedata.name(character, "").startswith("VARIATION SELECTOR")
    )


def escape_hidden(text: str) -> str:
    """Replace hidden characters with their code points, such as U+202E.

    Args:
        text: Any text, lone surrogates included.

    Returns:
        Text that can be encoded as UTF-8, sends no control sequence to a terminal and reorders no text around it.
    """
    if text.isascii() and text.isprintable():  # fast: most texts have no hidden characters
        return text
    return "".join(f"U+{ord(c):04X}" if is_hidden(c) else c for c in text)


def share(part: int, whole: int) -> str:
    """Write a share as a percentage.

    Args:
        part: Part of `whole`.
        whole: 0 results in 0%.

    Returns:
        A text such as `25%`, `under 1%` or `over 99%`; 0% and 100% are exact.
    """
    if 0 < part < 0.01 * whole:
        return "under 1%"
    if 0.99 * whole < part < whole:
        return "over 99%"
    return f"{100 * part / max(1, whole):.0f}%"


def count_of(number: int, noun: str) -> str:
    """Write a count, such as `1 sample` or `3,987 tokens`.

    Args:
        number: The count.
        noun: Its noun, in the singular.

    Returns:
        The count and the noun, in the plural unless the count is 1.
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def describe_row(preview: Preview, row: int) -> str:
    """Describe how full a row is.

    Args:
        preview: The preview.
        row: The row's index.

    Returns:
        A text such as `row 3: 5 samples, 3,987 of 4,096 tokens, 97%`.
    """
    shape = preview.rows[row]
    used = shape.used
    text = f"row {row + 1}: {count_of(len(shape.samples), 'sample')}, "
    if shared := sum(map(bool, shape.prefixes)):
        text += f"{count_of(shared, 'shared image')}, "
    if shape.capacity:
        text += f"{used:,} of {count_of(shape.capacity, 'token')}, {share(used, shape.capacity)}"
    else:
        text += count_of(used, "token")
    return text + (f", {shape.padding:,} padding" if shape.padding else "")
