"""Rows that a run trained and held out, by content, so that a run that continues it keeps them on their sides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_llava.core.errors import UserError
from lora_llava.core.storage import atomic_file
from lora_llava.data.encoded import EncodedTable

if TYPE_CHECKING:
    from lora_llava.splits.split_rows import Split

SEEN_FILE = "seen_rows.json"
HELD_OUT = ("validation", "test")
_DIGITS = 16
"""Hex digits kept of each hash: 64 bits, so that a million rows meet by chance once in 30 million runs."""


class RowContent(NamedTuple):
    """The content of a row, regardless of the names and formats of its files.

    Attributes:
        keys: Hashes of its images' pixels; for a row without images its own hash; none if an image cannot be read.
        row: Hash of its questions and images.
    """

    keys: tuple[str, ...]
    row: str


@dataclass(frozen=True)
class Seen:
    """The rows of a split, by content.

    Attributes:
        keys: See `RowContent.keys`.
        rows: See `RowContent.row`.
    """

    keys: frozenset[str] = frozenset()
    rows: frozenset[str] = frozenset()

    def __or__(self, other: Seen) -> Seen:
        return Seen(self.keys | other.keys, self.rows | other.rows)


@dataclass(frozen=True)
class SeenRows:
    """The rows that one or several runs trained and held out.

    Attributes:
        splits: `train`, `validation` and `test`.
        run: Name of the run in messages.
        warning: A line about what is not known; "" if all is known.
    """

    splits: Mapping[str, Seen] = field(default_factory=dict)
    run: str = ""
    warning: str = ""

    @property
    def trained(self) -> Seen:
        return self.splits.get("train", Seen())

    def held_out(self, split: str) -> frozenset[str]:
        """Return the keys that a split held out and that were not trained: ScienceQA's splits share images."""
        return self.splits.get(split, Seen()).keys - self.trained.keys

    @property
    def held_out_rows(self) -> frozenset[str]:
        return frozenset().union(*(self.splits.get(name, Seen()).rows for name in HELD_OUT))

    def __or__(self, other: SeenRows) -> SeenRows:
        names = dict.fromkeys([*self.splits, *other.splits])
        joined = {name: self.splits.get(name, Seen()) | other.splits.get(name, Seen()) for name in names}
        return SeenRows(joined, self.run or other.run, self.warning or other.warning)


def row_content(table: EncodedTable, row: int, pixels: Sequence[str]) -> RowContent:
    """Return the content of an encoded row.

    Args:
        table: The table.
        row: The row's index in it.
        pixels: The pixel hashes of its images, from `ImageFacts.pixels`.
    """
    ids, trained = table.row(row)
    digest = hashlib.sha256(np.ascontiguousarray(ids[~trained]).data)
    digest.update(" ".join(pixels).encode())
    own = digest.hexdigest()[:_DIGITS]
    if not pixels:
        return RowContent((own,) if len(ids) else (), own)
    return RowContent(tuple(pixels) if all(pixels) else (), own)


def split_contents(split: Split) -> Iterator[RowContent]:
    """Yield the content of a split's rows, whose images were opened."""
    for index in range(len(split.rows)):
        table, row = split.rows.table_row(index)
        yield row_content(table, row, [split.pixels.get(name, "") for name in split.rows.image_files(index)])


def seen_of(splits: Mapping[str, Split]) -> SeenRows:
    """Return the rows of a run's splits by content."""
    return SeenRows({name: _seen(split_contents(split)) for name, split in splits.items()})


def _seen(contents: Iterable[RowContent]) -> Seen:
    keys: set[str] = set()
    rows: set[str] = set()
    for content in contents:
        keys.update(content.keys)
        rows.add(content.row)
    return Seen(frozenset(keys), frozenset(rows))


def write_seen(folder: Path, own: SeenRows, earlier: SeenRows | None) -> None:
    """Write the rows that a run trains and holds out, and those of the runs that it continues.

    Args:
        folder: The run directory.
        own: The run's own rows.
        earlier: The rows of the run that it continues and of those before; None if it continues none.
    """
    content = {"format": 1, "own": _plain(own), "earlier": _plain(earlier) if earlier is not None else None}
    with atomic_file(folder / SEEN_FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _plain(seen: SeenRows) -> dict[str, Any]:
    splits = {name: {"keys": _joined(each.keys), "rows": _joined(each.rows)} for name, each in seen.splits.items()}
    return {"run": seen.run, "warning": seen.warning, "splits": splits}


def _joined(hashes: Iterable[str]) -> str:
    return "".join(sorted(hashes))


def read_seen(folder: Path) -> tuple[SeenRows, SeenRows | None] | None:
    """Read what a run trained and held out.

    Args:
        folder: The run directory, or a folder that the run was merged into.

    Returns:
        Its own rows, and those of the runs that it continues; None if an earlier version wrote the folder.

    Raises:
        UserError: If the file is damaged.
    """
    file = folder / SEEN_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return _parsed(content["own"]), _parsed(content["earlier"]) if content["earlier"] is not None else None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is damaged; restore it") from None


def _parsed(content: Mapping[str, Any]) -> SeenRows:
    splits = {str(name): Seen(_parted(each["keys"]), _parted(each["rows"])) for name, each in content["splits"].items()}
    return SeenRows(splits, str(content["run"]), str(content["warning"]))


def _parted(text: str) -> frozenset[str]:
    return frozenset(text[at : at + _DIGITS] for at in range(0, len(text), _DIGITS))
