"""Read rows of JSON, JSONL, CSV, TSV and Parquet files one at a time; a file is never completely in memory."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from lora_llava.core.errors import UserError
from lora_llava.core.storage import looked_in
from lora_llava.data.files.json_stream import (
    LONGEST,
    JsonStream,
    RepeatedKeyError,
    TooLongError,
    first_line,
    is_cut,
    keys_once,
)
from lora_llava.data.files.shards import SUFFIXES, all_shards, group_files, row_files, set_words, shard_of, split_words
from lora_llava.data.files.text_encoding import encoding_problem, text_encoding


class DataFileError(UserError):
    """A file whose content is not rows in the format of its suffix."""


_TABLES = (".csv", ".tsv")
_HINT = re.compile(r"sep=(.)\s*", re.IGNORECASE)
_FIRST = 500
"""Rows from which the total number is estimated."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Counted(Generic[Item]):
    """Items with their exact or estimated number, for a progress bar."""

    items: Iterator[Item]
    count: int

    def __iter__(self) -> Iterator[Item]:
        return self.items

    def __len__(self) -> int:
        return self.count


def data_file(path: str | Path, where: str = "data.path") -> Path:
    """Find the single file of rows at a path; see `data_files`.

    Raises:
        UserError: Also if the data set has several files.
    """
    found = data_files(path, where)
    if len(found) > 1:
        raise UserError(
            f"{where}: {path} has {len(found)} files, starting with {found[0].name}; name one file, or join them"
        )
    return found[0]


def data_files(path: str | Path, where: str = "data.path", split: str = "train") -> tuple[Path, ...]:
    """Find the files of rows at a path: one file, or the shards of one data set.

    Args:
        path: A file, a shard, or a folder with one file or one set; of several sets, the one named after the split. If
            a folder has none, its subfolders are searched.
        where: The recipe field of the path, for messages.
        split: The name of the split.

    Returns:
        The files, in order.

    Raises:
        UserError: If the path is missing, the file is of an unknown kind, the folder is ambiguous, or a shard is
            missing.
    """
    searched, path = looked_in(path), Path(path)
    if path.is_dir():
        sets = group_files(row_files(path)) or group_files(row_files(path, deeper=True))
        meant = [files for files in sets if set_words(files[0], path) & split_words(split)] if len(sets) > 1 else sets
        if len(meant) == 1:
            return all_shards(meant[0][0], where)
        found = ", ".join(str(files[0].relative_to(path)) for files in sets[:5]) or "none"
        raise UserError(f"{where}: {path} is a folder; name its file of rows ({', '.join(SUFFIXES)}); it has: {found}")
    shard = shard_of(path.name)
    if not path.is_file() and (shard is None or not path.parent.is_dir()):
        raise UserError(f"{where}: {path} is missing{searched}; it should be a file such as chat.json")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{where}: {path} is of an unknown kind; use one of {', '.join(SUFFIXES)}")
    return all_shards(path, where)


def json_text(content: Any, indent: int | None = None) -> str:
    """Return JSON text, not escaped unless it has half a surrogate pair, which UTF-8 cannot encode."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(content, indent=indent)
    return text


def estimate_rows(file: Path) -> int:
    """Estimate the number of rows of a file from its size and its first rows; it is exact for Parquet."""
    if file.suffix.lower() == ".parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.read_metadata(file).num_rows)
    table = file.suffix.lower() in _TABLES
    sizes = [
        sum(len(value) + 1 for value in row.values()) if table else len(json_text(row))
        for row in itertools.islice(iterate_rows(file), _FIRST)
    ]
    if len(sizes) < _FIRST:
        return len(sizes)
    return int(file.stat().st_size / (sum(sizes) / len(sizes)))


def iterate_rows(file: Path) -> Iterator[Any]:
    """Read a file's rows in order.

    Args:
        file: From `data_files`.

    Yields:
        One object per row: a dict, or whatever else a JSON file holds.

    Raises:
        DataFileError: If the content is not in the format of the suffix; the message names the line.
    """
    for _, row in _rows(file):
        yield row


def placed_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Read a file's rows in order, with their places; empty rows of a table are left out.

    Args:
        file: From `data_files`.

    Yields:
        The place and the content of each row. The place is the line of a CSV or JSONL file on which the row starts,
        `line 2`, or the index in a JSON list or Parquet file, `index 0`.

    Raises:
        DataFileError: See `iterate_rows`.
    """
    is_table = file.suffix.lower() in _TABLES
    for place, row in _rows(file):
        if not (is_table and _is_empty(row)):
            yield place, row


def empty_rows(file: Path) -> int:
    """Count a table's rows without text in any column, which spreadsheets write below the last row."""
    return sum(map(_is_empty, iterate_rows(file))) if file.suffix.lower() in _TABLES else 0


def _is_empty(row: dict[str, str]) -> bool:
    return not any(value.strip() for value in row.values())


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(file)
        elif suffix in _TABLES:
            yield from _table_rows(file)
        elif suffix == ".json":
            yield from _json_rows(file)
        else:
            yield from _jsonl_rows(file)
    except UnicodeDecodeError:
        raise DataFileError(f"{file}: {encoding_problem(file)}") from None
    except RecursionError:
        raise DataFileError(f"{file}: not readable as JSON: it is nested too deeply") from None


def _open_text(file: Path, newline: str | None = None) -> Any:
    return file.open(encoding=text_encoding(file), newline=newline)


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with _open_text(file) as stream:
        for number, line in enumerate(_pieces(stream), 1):
            if not line.strip():
                continue
            try:
                if len(line) > LONGEST:
                    raise TooLongError
                row = json.loads(line, object_pairs_hook=keys_once)
            except (RepeatedKeyError, TooLongError) as error:
                raise DataFileError(f"{file}, line {number}: {error}") from None
            except ValueError as error:
                fix = "; a list belongs in a .json file" if line.lstrip()[:1] == "[" else ""
                raise DataFileError(f"{file}, line {number}: not JSON: {first_line(error)}{fix}") from None
            yield f"line {number}", row


def _pieces(stream: Any) -> Iterator[str]:
    """Yield lines; lines that are too long for a row come in pieces."""
    return iter(lambda: stream.readline(LONGEST + 1), "")


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a list, or of JSON lines in a .json file."""
    with _open_text(file) as stream:
        reader = JsonStream(stream)
        opening = reader.peek()
        if opening == "{" and _has_more_lines(file):
            yield from _jsonl_rows(file)
            return
        if opening != "[":
            raise _no_list(file)
        count = 0
        try:
            for index in reader.elements():
                yield f"index {index}", reader.decode()
                count = index + 1
            reader.finish("list; write one list, or name the file .jsonl")
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            problem, ended = first_line(error), ""
            if isinstance(error, json.JSONDecodeError):
                problem = f"not JSON: {problem}"
                ended = " and the file ends there: it is truncated" if is_cut(error) else ""
            raise DataFileError(
                f"{file}, line {reader.line}: {problem}, after {count:,} complete rows{ended}"
            ) from None


def _no_list(file: Path) -> DataFileError:
    """Return the error about a JSON file that does not hold a list; it names a list inside it, if one exists."""
    if file.stat().st_size > LONGEST:
        return DataFileError(f"{file}: it should be a list of rows; save only the list")
    content = _read_all(file)
    items = content.items() if isinstance(content, dict) else ()
    lists = [key for key, value in items if isinstance(value, list)]
    fix = f"; save only the list under {lists[0]}" if lists else ""
    return DataFileError(f"{file}: it should be a list of rows, not {type(content).__name__}{fix}")


def _has_more_lines(file: Path) -> bool:
    """Check whether the first line is a complete JSON value and another line follows."""
    with _open_text(file) as stream:
        first = next((line for line in _pieces(stream) if line.strip()), "")
        try:
            json.loads(first)
        except ValueError:
            return False
        return any(line.strip() for line in _pieces(stream))


def _read_all(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding=text_encoding(file)))
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise DataFileError(f"{file}, line {line}: not JSON: {first_line(error)}") from None


def table_delimiter(file: Path) -> str:
    """Return the delimiter of a table: a tab in TSV; in CSV the most frequent one in the first line, of comma, tab, and
    semicolon, which spreadsheets write in locales with a decimal comma."""
    if file.suffix.lower() == ".tsv":
        return "\t"
    with _open_text(file) as stream:
        header = stream.readline(LONGEST)
    hint = _HINT.fullmatch(header)
    return hint[1] if hint else max(",;\t", key=header.count)


def is_hint(cells: Sequence[str]) -> bool:
    """Check whether a line names the delimiter, as Excel writes and reads it: `sep=;` above the column names."""
    return len(cells) == 2 and cells[0].lower() == "sep=" and not cells[1]


def _table_rows(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield a table's rows with the line on which each starts; a quoted cell may have several lines."""
    csv.field_size_limit(LONGEST)
    delimiter = table_delimiter(file)
    with _open_text(file, newline="") as stream:
        reader = csv.reader(_lines(stream), delimiter=delimiter, strict=True)
        names: list[str] = []
        start = 1
        try:
            for cells in reader:
                if cells and not names and not is_hint(cells):
                    names = _header(file, cells)
                elif cells and names and len(cells) != len(names):
                    raise DataFileError(
                        f"{file}, line {start}: {len(cells)} fields, but the first line has {len(names)}; put text "
                        "that contains the separator in double quotes"
                    )
                elif cells and names:
                    yield f"line {start}", dict(zip(names, cells, strict=True))
                start = reader.line_num + 1
        except (csv.Error, TooLongError) as error:
            raise DataFileError(f"{file}, line {start}: not a table: {error}") from None


def _lines(stream: Any) -> Iterator[str]:
    for line in _pieces(stream):
        if len(line) > LONGEST:
            raise TooLongError
        yield line


def _header(file: Path, names: Sequence[str]) -> list[str]:
    """Return a table's column names without surrounding white space."""
    found = [name.strip() or f"(column {place})" for place, name in enumerate(names, 1)]
    twice = [name for name, count in Counter(found).items() if count > 1]
    if twice:
        raise DataFileError(f"{file}, line 1: the column {twice[0]!r} appears twice; rename one")
    return found


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    count = itertools.count()
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024, columns=_without_bytes(table)):
                for row in batch.to_pylist():
                    yield f"index {next(count)}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataFileError(f"{file}: not a Parquet file: {str(error).splitlines()[0]}") from None


def _without_bytes(table: Any) -> list[str]:
    """Return the columns to read; of images stored in the table, the path without the bytes."""
    leaves = [table.schema.column(i) for i in range(len(table.schema))]
    parents = [leaf.path.rpartition(".")[0] for leaf in leaves]
    return [
        leaf.path
        for leaf, parent in zip(leaves, parents, strict=True)
        if not (parent and parents.count(parent) > 1 and _is_bytes(leaf))
    ]


def _is_bytes(leaf: Any) -> bool:
    return leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "STRING"


def parquet_columns(file: Path) -> dict[str, bool]:
    """Return a Parquet file's columns, and for each whether it holds binary or nested values, such as images.

    Raises:
        DataFileError: If it is not a Parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataFileError(f"{file}: not a Parquet file: {str(error).splitlines()[0]}") from None

    def is_image(kind: Any) -> bool:
        if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            return is_image(kind.value_type)
        return bool(pyarrow.types.is_struct(kind) or pyarrow.types.is_binary(kind))

    return {field.name: is_image(field.type) for field in schema}
