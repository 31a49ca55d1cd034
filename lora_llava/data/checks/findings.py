"""The findings of checks of rows and images: errors and warnings with the row they are about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_llava.data.encoded import EncodedTable
from lora_llava.data.images.image_check import ImageFacts


@dataclass(frozen=True)
class Finding:
    """A finding about a row, a source or a split.

    Attributes:
        kind: The kind of finding, in a word or two.
        row: The row's id.
        message: The finding in a sentence, with the fix if there is one.
        number: The row's index in its source; -1 for a finding about a source or split.
        source: The source's name.
        split: The row's split.
        dropped: Whether the recipe drops the row because of it.
        name: The row's name in messages, such as `row a (rows.csv, line 2)`; empty for a source or split.
    """

    kind: str
    row: str
    message: str
    number: int
    source: str
    split: str
    dropped: bool = False
    name: str = ""


@dataclass
class CheckReport:
    """The result of a check.

    Attributes:
        rows: Number of rows read, in all splits.
        errors: Findings that would stop the run or invalidate its results.
        warnings: Other findings.
        splits: Statistics by split.
    """

    rows: int = 0
    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "errors": [finding.__dict__ for finding in self.errors],
            "warnings": [finding.__dict__ for finding in self.warnings],
            "splits": self.splits,
        }


@dataclass(frozen=True)
class CheckedSource:
    """The rows of one source in one split.

    Attributes:
        split: The split's name.
        name: The source's name.
        table: The source's encoded rows.
        rows: The indices of the rows in the split.
        images: The facts about the source's images, by name.
    """

    split: str
    name: str
    table: EncodedTable
    rows: np.ndarray
    images: Mapping[str, ImageFacts]

    def finding(self, kind: str, row: int, message: str, dropped: bool = False) -> Finding:
        message = f"{message}: the row is dropped" if dropped else message
        name = self.table.row_name(row)
        return Finding(kind, self.table.row_ids[row], message, row, self.name, self.split, dropped, name)

    @property
    def sound_rows(self) -> np.ndarray:
        """Indices of the split's rows that could be read."""
        return self.rows[~np.isin(self.rows, self.table.problems.where())]
