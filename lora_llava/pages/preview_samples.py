"""What a preview shows: samples as they are trained, the rows they share, and how both are put into words."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from PIL import Image

SPACE = "▁"
"""SentencePiece's mark of a space."""
NEWLINE = "⏎"
_BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # letters and marks to Unicode, nothing to the eye


@dataclass(frozen=True)
class PreviewToken:
    """A token, or a run of image positions.

    Attributes:
        id: Token id.
        text: The tokenizer's own piece, such as `▁dog` or `<0x0A>`.
        trained: The loss is taken on it.
        position: Index of its first id in the sample's `input_ids`.
        count: Equal ids that it stands for; more than 1 only for image positions.
        is_image: It is replaced by features of the image.
    """

    id: int
    text: str
    trained: bool
    position: int
    count: int = 1
    is_image: bool = False

    @property
    def newlines(self) -> int:
        """How often the piece breaks the line."""
        return 1 if self.text == "<0x0A>" else self.text.count("\n")


@dataclass(frozen=True)
class PreviewSample:
    """One sample.

    Attributes:
        source: The dataset or file that it comes from.
        row_id: Its name there.
        tokens: All of them, in order.
        images: RGB, as CLIP gets them, in the order of the placeholders.
        row: Index of the row that it lies in.
        notes: What a reader should know of it, such as "answer cut to fit".
        name: How messages name the row; nothing where only the id is known.
        names: The images' file names.
    """

    source: str
    row_id: str
    tokens: tuple[PreviewToken, ...]
    images: tuple[Image.Image, ...]
    row: int
    notes: tuple[str, ...] = ()
    name: str = ""
    names: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Tokens, image positions included."""
        return sum(token.count for token in self.tokens)

    @property
    def trained(self) -> int:
        """Tokens that the loss is taken on."""
        return sum(token.count for token in self.tokens if token.trained)


@dataclass(frozen=True)
class PreviewRow:
    """A row of a batch: one packed row, or one sample and its padding.

    Attributes:
        samples: Indices into the preview's samples, in order; -1 for a sample that is not shown.
        lengths: Tokens of each.
        capacity: The row's token budget, 0 if there is none.
        padding: Padding tokens.
    """

    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    capacity: int
    padding: int = 0

    @property
    def unused(self) -> int:
        """Tokens of the budget that nothing takes."""
        return max(0, self.capacity - sum(self.lengths) - self.padding)


@dataclass(frozen=True)
class Preview:
    """What is shown.

    Attributes:
        title: Heading.
        facts: Labels and values for the head, such as the recipe and the template.
        samples: In the order that they are shown.
        rows: The rows that they lie in.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    samples: tuple[PreviewSample, ...]
    rows: tuple[PreviewRow, ...]


def is_hidden(character: str) -> bool:
    """Whether a character is invisible or steers what is around it.

    Args:
        character: One.

    Returns:
        True for control, format and bidi characters, lone surrogates, unassigned and private ones, every space and line
        break but the plain space, and what is drawn as nothing.
    """
    if character == " ":
        return False
    return (
        unicodedata.category(character)[0] in "CZ"
        or character in _BLANK
        or unicodedata.name(character, "").startswith("VARIATION SELECTOR")
    )


def escape_hidden(text: str) -> str:
    """Write hidden characters by their code point, such as U+202E.

    Args:
        text: Any, lone surrogates included.

    Returns:
        Text that can be encoded as UTF-8, drives no terminal and reorders nothing outside itself.
    """
    return "".join(f"U+{ord(c):04X}" if is_hidden(c) else c for c in text)


def share(part: int, whole: int) -> str:
    """Write a share as a percentage.

    Args:
        part: Of `whole`.
        whole: 0 gives 0%.

    Returns:
        Such as `25%`, `under 1%` or `over 99%`; 0% is nothing and 100% is all.
    """
    if 0 < part < 0.01 * whole:
        return "under 1%"
    if 0.99 * whole < part < whole:
        return "over 99%"
    return f"{100 * part / max(1, whole):.0f}%"


def count_of(number: int, noun: str) -> str:
    """Write a count, such as `1 sample` or `3,987 tokens`.

    Args:
        number: How many.
        noun: In the singular.

    Returns:
        Both.
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def describe_row(preview: Preview, row: int) -> str:
    """Say how full a row is.

    Args:
        preview: Holds the row.
        row: Its index.

    Returns:
        Such as `row 3: 5 samples, 3,987 of 4,096 tokens, 97%`.
    """
    shape = preview.rows[row]
    used = sum(shape.lengths)
    text = f"row {row + 1}: {count_of(len(shape.samples), 'sample')}, "
    if shape.capacity:
        text += f"{used:,} of {count_of(shape.capacity, 'token')}, {share(used, shape.capacity)}"
    else:
        text += count_of(used, "token")
    return text + (f", {shape.padding:,} padding" if shape.padding else "")
