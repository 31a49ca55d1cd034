"""What all row formats share: their base class, the names of columns, cells that hold lists, and the row error."""

from __future__ import annotations

import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lora_llava.data.conversation import EncodingError
from lora_llava.data.files.json_stream import keys_once

_PYTHON_LIST = re.compile(r"\[\s*(?:'[^'\\]*'[\s,]*)*\]")
"""A list of strings as pandas writes it into a CSV, from Python lists and from NumPy arrays."""


class RowError(EncodingError):
    """A row that cannot be read as a conversation; such rows are counted by `kind`, the reason in a word or two."""

    row_id = name = ""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message, kind)


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns.

    Attributes:
        image: The image's file name, or the image itself.
        question: The user's text.
        answer: The text that is trained.
        caption: The image's caption, in captions.
        id: The row's name.
    """

    image: str = "image"
    question: str = "question"
    answer: str = "answer"
    caption: str = "caption"
    id: str = "id"


@dataclass(frozen=True)
class Sample:
    """The first rows of a file, from which its format is detected.

    Attributes:
        file: The file, for messages.
        row: The rows merged into one: for each key, the first value that is not empty.
        roles: The column found for each attribute of `Columns`; None where no column has a known name.
    """

    file: Path
    row: Mapping[str, Any]
    roles: Mapping[str, str | None]

    def columns(self, **changed: str) -> Columns:
        """Return the columns that were found, with some replaced."""
        return Columns(**{role: name for role, name in self.roles.items() if name is not None} | changed)


@dataclass(frozen=True)
class Detected:
    """The format detected in a file.

    Attributes:
        choice: The value of `data.format` that reads it.
        shape: A description for a person.
        columns: The table's columns.
    """

    choice: str
    shape: str
    columns: Columns


class RowFormat(ABC):
    """A row format. A module of this package defines one and an instance of it called `FORMAT`.

    Attributes:
        precedence: The order of detection, and of the formats in messages.
        summary: A description for the recipe's schema.
        choices: The values of `data.format` under which rows may have this format.
        keys: Columns that belong to this format whatever `data.columns` is.
        aliases: For attributes of `Columns`, the column names found in the wild, the likeliest first.
        is_chat: Whether rows hold messages, whose texts place the images.
        is_fallback: Whether a row has this format only if it has none of the others.
    """

    precedence: ClassVar[int]
    summary: ClassVar[str]
    choices: ClassVar[tuple[str, ...]]
    keys: ClassVar[tuple[str, ...]] = ()
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    is_chat: ClassVar[bool] = False
    is_fallback: ClassVar[bool] = False

    @abstractmethod
    def needs(self, columns: Columns) -> tuple[str, ...]:
        """Return the columns that a row of this format must have."""

    def matches(self, row: Mapping[str, Any], columns: Columns) -> list[str]:
        """Return the columns by which a row has this format, named as in messages; empty if it has another one."""
        needed = self.needs(columns)
        return ["/".join(needed)] if all(name in row for name in needed) else []

    def lacking(self, row: Mapping[str, Any], columns: Columns) -> list[str]:
        """Return the needed columns that a row lacks."""
        return [name for name in self.needs(columns) if name not in row]

    @abstractmethod
    def messages(self, row: Mapping[str, Any], match: str, columns: Columns, rng: random.Random) -> list[Any]:
        """Return the row's messages, for `read_turns`.

        Args:
            row: The row.
            match: The item of `matches` by which the row has this format.
            columns: The table's columns.
            rng: Draws what is random.

        Raises:
            RowError: If the row is malformed.
        """

    @abstractmethod
    def detect(self, sample: Sample) -> Detected | None:
        """Detect this format in a file's first rows; None for another format.

        Raises:
            UserError: If the rows have this format but cannot be read.
        """


class ChatFormat(RowFormat):
    """Rows with a list of messages under one of `keys`."""

    choices = ("conversations", "captions")
    is_chat = True

    def needs(self, columns: Columns) -> tuple[str, ...]:
        return self.keys[:1]

    def matches(self, row: Mapping[str, Any], columns: Columns) -> list[str]:
        return [key for key in self.keys if row.get(key, "") != ""]  # a table's cell may be empty

    def lacking(self, row: Mapping[str, Any], columns: Columns) -> list[str]:
        return [] if self.matches(row, columns) else list(self.needs(columns))

    def messages(self, row: Mapping[str, Any], match: str, columns: Columns, rng: random.Random) -> list[Any]:
        messages = listed(row[match], match)
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise RowError("malformed row", f"{match} is {messages!r:.60}; a row has id, image and conversations")
        system = row.get("system")
        if isinstance(system, str) and system:  # ShareGPT as LLaMA-Factory writes it
            return [{"role": "system", "content": system}, *messages]
        return list(messages)

    def detect(self, sample: Sample) -> Detected | None:
        key = next((key for key in self.keys if key in sample.row), None)
        if key is None:
            return None
        try:
            messages = listed(sample.row[key], key)
        except RowError:  # reported row by row when the rows are read
            messages = None
        first = messages[0] if isinstance(messages, list) and messages else {}
        kind = "LLaVA's or ShareGPT's from and value" if isinstance(first, Mapping) and "from" in first else "messages"
        return Detected("conversations", f"conversations ({kind})", sample.columns())


def cell_text(row: Mapping[str, Any], column: str) -> str:
    """Return a cell as text; numbers are accepted.

    Raises:
        RowError: If the cell holds anything else.
    """
    value = row[column]
    if isinstance(value, (str, int, float)):
        return str(value)
    raise RowError("malformed row", f"{column} is {value!r:.60}; it should be text")


def listed(value: Any, column: str) -> Any:
    """Return the list that a text holds, as a cell of a CSV or Parquet file may; any other value unchanged.

    Raises:
        RowError: If a text in square brackets is not a list.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return value
    try:
        return json.loads(text, object_pairs_hook=keys_once)
    except (ValueError, RecursionError):
        if _PYTHON_LIST.fullmatch(text):
            return re.findall(r"'([^']*)'", text)
    raise RowError("malformed row", f'{column} is {value!r:.60}, which is not a JSON list; write it as ["a", "b"]')


def alternatives(names: Iterable[str]) -> str:
    """Join names as "a, b, or c"."""
    *others, last = names
    if not others:
        return last
    return f"{', '.join(others)}{',' if len(others) > 1 else ''} or {last}"
