"""Hugging Face's `imagefolder`: `metadata.csv` or `metadata.jsonl` beside the images, which `file_name` names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_llava.data.files.row_files import DataFileError, placed_rows
from lora_llava.data.folder_kinds.folder_kind import (
    ConvertedFolder,
    FolderKind,
    FolderOptions,
    ImageFinder,
    counted,
    object_rows,
    split_of,
)

_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_COLUMNS = ("file_name", "image_file_name")


class HuggingFaceImageFolder(FolderKind):
    """A metadata file in the folder, or in the folder of each split."""

    summary = "Hugging Face imagefolder"

    def find(self, folder: Path, files: Sequence[Path]) -> list[Path]:
        return [file for file in files if file.name.lower() in _NAMES and _names_files(file)]

    def convert(self, folder: Path, files: Sequence[Path], options: FolderOptions) -> ConvertedFolder:
        found = ConvertedFolder(self.summary, is_table=True)
        finder = ImageFinder(folder, options.follow_links, found.left_out)
        counts: Counter[str] = Counter()
        for file in files:
            beside = file.parent.relative_to(folder).as_posix() if file.parent.is_relative_to(folder) else ""
            where = f"{beside}/{file.name}" if beside not in ("", ".") else file.name
            for place, row in object_rows(file):
                column = next(filter(_is_file_name, row), None)
                image = finder.find(None if column is None else row[column], beside, "rows")
                if image is None:
                    continue
                split = split_of(folder / image, folder) if beside in ("", ".") else split_of(file, folder)
                rest = {str(name): value for name, value in row.items() if name != column}
                found.add(split, {**rest, "id": f"{where} {place.removeprefix(file.name).strip()}", "image": image})
                counts[where] += 1
        found.facts.append(("rows by file", counted(counts)))
        return found


def _names_files(file: Path) -> bool:
    """Check whether the first row has a column of file names; without one, the file is a table like others."""
    try:
        _, first = next(placed_rows(file), ("", None))
    except DataFileError:  # reported where the file is read as a table
        return False
    return isinstance(first, Mapping) and any(map(_is_file_name, first))


def _is_file_name(column: object) -> bool:
    return str(column).strip().lower() in _COLUMNS
