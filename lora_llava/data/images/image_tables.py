"""Tables whose rows contain images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError


def open_table(
    path: str, split: str, revision: str | None, where: str = "data.path", files: Sequence[Path] = ()
) -> Any:
    """Open Parquet files, or a data set on the Hub, with its images undecoded.

    Args:
        path: A Parquet file or a Hub id.
        split: The split of a Hub data set.
        revision: Branch, tag or commit of a Hub id.
        where: The recipe field of the path, for messages.
        files: The Parquet files of one data set, in order, instead of the path.

    Returns:
        A `datasets.Dataset`; columns of images contain `{"bytes", "path"}`.

    Raises:
        UserError: If it cannot be read.
    """
    import datasets  # slow to import, and only needed here

    try:
        if files or Path(path).is_file():
            names = [str(file) for file in files] or [path]
            table = datasets.load_dataset("parquet", data_files=names, split="train")
        else:
            table = datasets.load_dataset(path, split=split, revision=revision)
    except Exception as error:  # the library raises many kinds of errors for a missing name
        raise UserError(f"{where}: {path}, split {split!r}, cannot be read: {str(error).splitlines()[0]}") from None
    undecoded = datasets.Image(decode=False)
    for name, feature in table.features.items():
        nested = getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, undecoded)
        elif isinstance(nested, datasets.Image):
            table = table.cast_column(name, datasets.List(undecoded))
    return table
