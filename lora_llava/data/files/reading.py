"""Rows of JSON, JSONL, CSV, TSV and Parquet files, one at a time: a file is never in memory as a whole."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from lora_llava.core.errors import UserError
from lora_llava.core.storage import looked_in
from lora_llava.data.files.json_stream import LONGEST, JsonStream, RepeatedKeyError, TooLongError, keys_once
from lora_llava.data.files.shards import SUFFIXES, group_files, row_files, set_words, shard_of, split_words, whole_set
from lora_llava.data.files.text_encoding import encoding_problem, text_encoding


class DataFileError(UserError):
    """A file that is there but does not hold rows as its name says."""


_TABLES = (".csv", ".tsv")
_FIRST = 500
"""Rows from which the number of all is estimated."""
_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_BEGINNINGS = {word[:size] for word in (*_WORDS, ".", "e+", "e-", "E+", "E-") for size in range(1, len(word) + 1)}
"""What is left of a value where a file is cut off."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Counted(Generic[Item]):
    """Items of which it is known, or nearly so, how many there will be: a progress bar can tell when it is done."""

    items: Iterator[Item]
    count: int

    def __iter__(self) -> Iterator[Item]:
        return self.items

    def __len__(self) -> int:
        return self.count


def data_file(path: str | Path, where: str = "data.path") -> Path:
    """Find the one file of rows that a path means; see `data_files`.

    Raises:
        UserError: Also for a data set in several files.
    """
    found = data_files(path, where)
    if len(found) > 1:
        raise UserError(f"{where}: {path} is {len(found)} files, from {found[0].name} on; name one file, or join them")
    return found[0]


def data_files(path: str | Path, where: str = "data.path", split: str = "train") -> tuple[Path, ...]:
    """Find the files of rows that a path means: one, or the shards of one data set.

    Args:
        path: A file, a shard of a set, or a folder with one file or one set in it; of several sets, the one that is
            named after the split is meant. A folder without any is looked at one level deeper.
        where: The field that names it, for messages.
        split: Name of the split.

    Returns:
        The files, in order.

    Raises:
        UserError: For a path that is not there, an unknown kind of file, a folder in which it is not clear what is
            meant, or a set that lacks a shard.
    """
    looked, path = looked_in(path), Path(path)
    if path.is_dir():
        sets = group_files(row_files(path)) or group_files(row_files(path, deeper=True))
        meant = [files for files in sets if set_words(files[0], path) & split_words(split)] if len(sets) > 1 else sets
        if len(meant) == 1:
            return whole_set(meant[0][0], where)
        found = ", ".join(str(files[0].relative_to(path)) for files in sets[:5]) or "none"
        raise UserError(
            f"{where}: {path} is a folder; name its file of rows ({', '.join(SUFFIXES)}); it holds: {found}"
        )
    shard = shard_of(path.name)
    if not path.is_file() and (shard is None or not path.parent.is_dir()):
        raise UserError(f"{where}: {path} is missing{looked}; it should be a file such as chat.json")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{where}: {path} is of no known kind; use one of {', '.join(SUFFIXES)}")
    return whole_set(path, where)


def json_text(content: Any, indent: int | None = None) -> str:
    """JSON with letters as they are, or escaped where one is half a surrogate pair, which UTF-8 cannot hold."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(content, indent=indent)
    return text


def file_hash(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def estimate_rows(file: Path) -> int:
    """About how many rows a file has, from its size and its first rows; of a Parquet file, exactly."""
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
    """Read all of a file's rows in order.

    Args:
        file: From `data_files`.

    Yields:
        One object per row: a dict as a rule; whatever else a JSON file holds is for the caller to refuse.

    Raises:
        DataFileError: For text that is not what the suffix says, with the line.
    """
    for _, row in _rows(file):
        yield row


def placed_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Read a file's rows in order, with their places; a table's rows without any text are left out.

    Args:
        file: From `data_files`.

    Yields:
        For each row its place for a person and its content. The place is the line of a CSV or JSONL file on which the
        row begins, `line 2`, or its index in a JSON list or Parquet file, `index 0`.

    Raises:
        DataFileError: See `iterate_rows`.
    """
    is_table = file.suffix.lower() in _TABLES
    for place, row in _rows(file):
        if not (is_table and _is_empty(row)):
            yield place, row


def empty_rows(file: Path) -> int:
    """How many of a table's rows have no text in any column, as spreadsheets write them below the last one."""
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
        raise DataFileError(f"{file}: not JSON that can be read: it is nested too deeply") from None


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
                mend = "; a list belongs into a file called .json" if line.lstrip()[:1] == "[" else ""
                raise DataFileError(f"{file}, line {number}: not JSON: {_first(error)}{mend}") from None
            yield f"line {number}", row


def _pieces(stream: Any) -> Iterator[str]:
    """Lines, of which those that are longer than a row may be come in pieces."""
    return iter(lambda: stream.readline(LONGEST + 1), "")


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """A list's rows, or those of JSON lines that are called .json, as many are."""
    with _open_text(file) as stream:
        reader = JsonStream(stream)
        opening = reader.peek()
        if opening == "{" and _has_more_lines(file):
            yield from _jsonl_rows(file)
            return
        if opening != "[":
            raise _no_list(file)
        reader.take(1)
        count = 0
        while (sign := reader.peek()) != "]":
            if count and sign != ",":
                raise _not_json(file, reader, count, "Expecting ',' delimiter", reader.place)
            if count:
                reader.take(1)
                reader.peek()
            try:
                row = reader.decode()
            except json.JSONDecodeError as error:
                raise _not_json(file, reader, count, error.msg, error.pos) from None
            except ValueError as error:
                raise DataFileError(
                    f"{file}, line {reader.line}: {_first(error)}, after {count:,} whole rows"
                ) from None
            yield f"index {count}", row
            count += 1
        reader.take(1)
        if reader.peek():
            more = "something follows the end of the list; make it one, or call the file .jsonl"
            raise _not_json(file, reader, count, more, reader.place)


def _no_list(file: Path) -> DataFileError:
    """What a JSON file holds in place of a list, and where in it one is."""
    if file.stat().st_size > LONGEST:
        return DataFileError(f"{file}: it should hold a list of rows; give the list by itself")
    content = _whole(file)
    items = content.items() if isinstance(content, dict) else ()
    lists = [key for key, value in items if isinstance(value, list)]
    mend = f"; give the list under {lists[0]} by itself" if lists else ""
    return DataFileError(f"{file}: it should hold a list of rows; it holds {type(content).__name__}{mend}")


def _has_more_lines(file: Path) -> bool:
    """Whether the first line is a whole JSON value and another follows."""
    with _open_text(file) as stream:
        first = next((line for line in _pieces(stream) if line.strip()), "")
        try:
            json.loads(first)
        except ValueError:
            return False
        return any(line.strip() for line in _pieces(stream))


def _whole(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding=text_encoding(file)))
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise DataFileError(f"{file}, line {line}: not JSON: {_first(error)}") from None


def _not_json(file: Path, reader: JsonStream, count: int, problem: str, place: int) -> DataFileError:
    """What is wrong at a place of the reader's text, which is read to the file's end, and whether it ends there."""
    rest = reader.text[place:].strip()
    half_escape = problem.startswith("Invalid \\u") and len(rest) <= len("\\uXXXX")
    cut = not rest or rest in _BEGINNINGS or half_escape or problem.startswith("Unterminated string")
    ended = " and the file ends there: it is cut off" if cut else ""
    return DataFileError(f"{file}, line {reader.line}: not JSON: {problem}, after {count:,} whole rows{ended}")


def _first(error: ValueError) -> str:
    return str(getattr(error, "msg", error)).splitlines()[0].partition("; use sys.")[0]  # Python's advice on numbers


def table_delimiter(file: Path) -> str:
    """What separates a table's fields: a tab in TSV; in CSV what its first line has most of: a comma, a tab, or a
    semicolon, which spreadsheets write where the comma is the decimal sign."""
    if file.suffix.lower() == ".tsv":
        return "\t"
    with _open_text(file) as stream:
        header = stream.readline(LONGEST)
    return max(",;\t", key=header.count)


def _table_rows(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A table's rows with the line on which each begins; a quoted cell may go over several lines."""
    csv.field_size_limit(LONGEST)
    delimiter = table_delimiter(file)
    with _open_text(file, newline="") as stream:
        reader = csv.reader(_lines(stream), delimiter=delimiter, strict=True)
        names: list[str] = []
        start = 1
        try:
            for cells in reader:
                if cells and not names:
                    names = _header(file, cells)
                elif cells and len(cells) != len(names):
                    raise DataFileError(
                        f"{file}, line {start}: {len(cells)} fields, where its first line names {len(names)}; put text "
                        "that holds the separator in double quotes"
                    )
                elif cells:
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
    """A table's column names without the white space around them."""
    found = [name.strip() or f"(column {place})" for place, name in enumerate(names, 1)]
    twice = [name for name, count in Counter(found).items() if count > 1]
    if twice:
        raise DataFileError(f"{file}, line 1: the column {twice[0]!r} stands there twice; rename one")
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
    """The columns to read: of an image that is stored in the table, its path and not its bytes."""
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
    """A Parquet file's columns, and which of them hold something else than text and numbers, such as images.

    Raises:
        DataFileError: Where it is no Parquet file.
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
