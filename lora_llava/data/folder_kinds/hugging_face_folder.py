"""Hugging Face's `imagefolder`: `metadata.csv` or `metadata.jsonl` beside the images, which `file_name` names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lora_llava.core.errors import UserError
from lora_llava.data.files.row_files import placed_rows
from lora_llava.data.folder_kinds.folder_kind import (
    ConvertedFolder,
    FolderKind,
    FolderOptions,
    ImageFinder,
    counted,
    split_of,
)

_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_COLUMNS = ("file_name", "image_file_name")


class HuggingFaceImageFolder(FolderKind):
    """A metadata file in the folder, or in the folder of each split."""

    summary = "Hugging Face imagefolder"

    def find(self, folder: Path, files: Sequence[Path]) -> list[Path]:
        return [file for file in files if file.name.lower() in _NAMES]

    def convert(self, folder: Path, files: Sequence[Path], options: FolderOptions) -> ConvertedFolder:
        found = ConvertedFolder(self.summary, is_table=True)
        finder = ImageFinder(folder, options.follow_links, found.left_out)
        counts: Counter[str] = Counter()
        for file in files:
            beside = file.parent.relative_to(folder).as_posix() if file.parent.is_relative_to(folder) else ""
            where = f"{beside}/{file.name}" if beside not in ("", ".") else file.name
            for place, row in placed_rows(file):
                column = next((name for name in row if str(name).strip().lower() in _COLUMNS), None)
                if column is None:
                    raise UserError(
                        f"{file}: it has no column file_name; it has {', '.join(map(str, row))}; rename the column "
                        "with the images"
                    )
                image = finder.find(row[column], beside, "rows")
                if image is None:
                    continue
                split = split_of(folder / image, folder) if beside in ("", ".") else split_of(file, folder)
                rest = {str(name): value for name, value in row.items() if name != column}
                found.add(split, {**rest, "id": f"{where} {place}", "image": image})
                counts[where] += 1
        found.facts.append(("rows by file", counted(counts)))
        return found
