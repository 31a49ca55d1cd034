"""Rows of an evaluation that the run was trained on, by the content of their images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_llava.data.images.image_id import ImageName
from lora_llava.splits.encoded_sources import inspect_split
from lora_llava.splits.seen_rows import SeenRows, split_contents
from lora_llava.splits.split_rows import Split


@dataclass(frozen=True)
class TrainedRows:
    """How many rows of an evaluation were trained.

    Attributes:
        rows: Rows that were compared.
        same_row: Rows whose question was trained with the same image, or without one.
        same_image: Other rows with an image that was trained.
        warning: What is not known; "" if all is known.
    """

    rows: int
    same_row: int
    same_image: int
    warning: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self, run: str) -> list[str]:
        """Return warnings about these rows; none if no row was trained."""
        lines = [f"warning: {self.warning}"] if self.warning else []
        if not self.same_row + self.same_image:
            return lines
        verb = "is" if self.same_row + self.same_image == 1 else "are"
        line = (
            f"warning: {self.same_row + self.same_image:,} of {self.rows:,} rows {verb} in the training data of {run}: "
        )
        parts = {"with the same question": self.same_row, "with the same image and another question": self.same_image}
        counts = ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)
        return [*lines, f"{line}{counts}; their scores do not show how it does on new images"]


def count_trained(split: Split, seen: SeenRows) -> TrainedRows:
    """Count the rows of a split that earlier runs trained.

    Args:
        split: The rows; images that were not opened yet are opened.
        seen: The rows of those runs.
    """
    pixels: Mapping[ImageName, str] = split.pixels
    if not pixels:
        names = dict.fromkeys(name for i in range(len(split.rows)) for name in split.rows.image_files(i))
        pixels = {name: facts.pixels for name, facts in inspect_split(split.sources, list(names)).items()}
    same_row = same_image = 0
    for content in split_contents(replace(split, pixels=pixels)):
        if content.row in seen.trained.rows:
            same_row += 1
        elif any(key in seen.trained.keys for key in content.keys):
            same_image += 1
    return TrainedRows(len(split.rows), same_row, same_image, seen.warning)
