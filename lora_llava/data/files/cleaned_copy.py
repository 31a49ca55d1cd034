"""Write a cleaned copy of a file of rows, beside it and in the same format."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.core.storage import atomic_file
from lora_llava.data.files.row_files import estimate_rows, is_hint, json_text, placed_rows, table_delimiter
from lora_llava.data.files.shards import shard_of
from lora_llava.data.files.text_encoding import text_encoding

_HEAD = 1 << 16


def fixed_name(file: Path) -> Path:
    """Return the name of a file's cleaned copy: `rows.fixed.json` for `rows.json`; copies of shards are a set again."""
    shard = shard_of(file.name)
    if shard is None:
        return file.with_name(f"{file.stem}.fixed{file.suffix}")
    stem = shard.stem.rstrip("-_.")
    return file.with_name(f"{stem}.fixed-{file.name[len(shard.stem) :]}")


def write_set_without(files: Sequence[Path], dropped: Container[int]) -> Iterator[tuple[Path, Path, int, int]]:
    """Copy the files of one data set without some of its rows; see `write_without`.

    Args:
        files: The files in order; they are not changed.
        dropped: Indices of the rows to leave out, counted over all files.

    Yields:
        Each file, its copy, the number of rows in the copy, and the number of rows left out.

    Raises:
        UserError: If a copy already exists.
    """
    for file in files:
        _refuse_existing(fixed_name(file))
    start = 0
    for file in files:
        rows = estimate_rows(file) if file.suffix.lower() == ".parquet" else sum(1 for _ in placed_rows(file))
        mine = {number - start for number in range(start, start + rows) if number in dropped}
        target, count = write_without(file, mine)
        yield file, target, count, len(mine)
        start += rows


def write_without(file: Path, dropped: Container[int]) -> tuple[Path, int]:
    """Copy a file of rows without some of them; the values of the others are unchanged.

    The copy of a text file is UTF-8, whatever the encoding of the file.

    Args:
        file: The file; it is not changed.
        dropped: Indices of the rows to leave out; a table's empty rows are not counted, and are left out.

    Returns:
        The copy and its number of rows.

    Raises:
        UserError: If the copy already exists.
    """
    target = fixed_name(file)
    _refuse_existing(target)
    with atomic_file(target) as temporary:
        suffix = file.suffix.lower()
        if suffix == ".parquet":
            count = _copy_parquet(file, dropped, temporary)
        else:
            rows = (row for number, (_, row) in enumerate(placed_rows(file)) if number not in dropped)
            write = {".csv": _write_table, ".tsv": _write_table, ".json": _write_json}.get(suffix, _write_lines)
            count = write(rows, temporary, file)
    return target, count


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise UserError(f"--fix: {target} already exists; move it away, or use it with data.path={target}")


def _write_json(rows: Iterable[Any], target: Path, file: Path) -> int:
    count = 0
    with target.open("w", encoding="utf-8") as stream:
        stream.write("[")
        for count, row in enumerate(rows, 1):
            stream.write(",\n" if count > 1 else "\n")
            stream.write(json_text(row))
        stream.write("\n]\n")
    return count


def _write_lines(rows: Iterable[Any], target: Path, file: Path) -> int:
    with target.open("w", encoding="utf-8") as stream:
        return sum(bool(stream.write(json_text(row) + "\n")) for row in rows)


def _write_table(rows: Iterable[Any], target: Path, file: Path) -> int:
    delimiter = table_delimiter(file)
    head = file.read_bytes()[:_HEAD]
    source_encoding = text_encoding(file)
    with file.open(encoding=source_encoding, newline="") as stream:
        lines = csv.reader(stream, delimiter=delimiter, strict=True)
        header = next((cells for cells in lines if not is_hint(cells)), [])
    # Spreadsheets that wrote a byte order mark or another encoding read UTF-8 only with a mark.
    marked = head.startswith(codecs.BOM_UTF8) or source_encoding != "utf-8-sig"
    encoding = "utf-8-sig" if marked else "utf-8"
    ending = "\r\n" if b"\r\n" in head.replace(b"\0", b"") else "\n"
    with target.open("w", encoding=encoding, newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter, lineterminator=ending)
        writer.writerow(header)
        return sum(bool(writer.writerow(row.values())) for row in rows)


def _copy_parquet(file: Path, dropped: Container[int], target: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    def kept(start: int, size: int) -> Iterator[int]:
        return (place for place in range(size) if start + place not in dropped)

    count = start = 0
    with pyarrow.parquet.ParquetFile(file) as table:
        with pyarrow.parquet.ParquetWriter(target, table.schema_arrow) as writer:
            for batch in table.iter_batches(batch_size=256):
                left = batch.take(pyarrow.array(list(kept(start, len(batch))), pyarrow.int64()))
                writer.write_batch(left)
                start, count = start + len(batch), count + len(left)
    return count
