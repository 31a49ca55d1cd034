"""Rows of JSON, JSONL, CSV, TSV and Parquet files, one at a time: a file is never in memory as a whole."""

from __future__ import annotations

import codecs
import csv
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from lora_llava.data.json_stream import LONGEST, JsonStream, RepeatedKeyError, TooLongError, keys_once
from lora_llava.errors import UserError
from lora_llava.storage import looked_in


class DataFileError(UserError):
    """A file that is there but does not hold rows as its name says."""


SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_CHUNK = 1 << 20
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
    """Find the one file of rows that a path means.

    Args:
        path: A file, or a folder with exactly one such file in it.
        where: The field that names it, for messages.

    Returns:
        The file.

    Raises:
        UserError: For a path that is not there, an unknown kind of file, or a folder with none or several.
    """
    looked, path = looked_in(path), Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if len(files) == 1:
            return files[0]
        found = ", ".join(file.name for file in files[:5]) or "none"
        raise UserError(
            f"{where}: {path} is a folder; name its file of rows ({', '.join(SUFFIXES)}); it holds: {found}"
        )
    if not path.is_file():
        raise UserError(f"{where}: {path} is missing{looked}; it should be a file such as chat.json")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{where}: {path} is of no known kind; use one of {', '.join(SUFFIXES)}")
    return path


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
    table = file.suffix.lower() in (".csv", ".tsv")
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
        file: From `data_file`.

    Yields:
        One object per row: a dict as a rule; whatever else a JSON file holds is for the caller to refuse.

    Raises:
        DataFileError: For text that is not what the suffix says, with the line.
    """
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(file)
        elif suffix in (".csv", ".tsv"):
            yield from _table_rows(file)
        elif suffix == ".json":
            yield from _json_rows(file)
        else:
            yield from _jsonl_rows(file)
    except UnicodeDecodeError as error:
        place = _undecodable(file)
        raise DataFileError(f"{file}: not UTF-8: {error.reason} at byte {place}; save it as UTF-8") from None
    except RecursionError:
        raise DataFileError(f"{file}: not JSON that can be read: it is nested too deeply") from None


def _undecodable(file: Path) -> int:
    """Where a file's first byte is that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    place = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return place - waiting + error.start
            place += len(chunk)
    return place


def _jsonl_rows(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(_pieces(stream), 1):
            if not line.strip():
                continue
            try:
                if len(line) > LONGEST:
                    raise TooLongError
                yield json.loads(line, object_pairs_hook=keys_once)
            except (RepeatedKeyError, TooLongError) as error:
                raise DataFileError(f"{file}, line {number}: {error}") from None
            except ValueError as error:
                mend = "; a list belongs into a file called .json" if line.lstrip()[:1] == "[" else ""
                raise DataFileError(f"{file}, line {number}: not JSON: {_first(error)}{mend}") from None


def _pieces(stream: Any) -> Iterator[str]:
    """Lines, of which those that are longer than a row may be come in pieces."""
    return iter(lambda: stream.readline(LONGEST + 1), "")


def _json_rows(file: Path) -> Iterator[Any]:
    """A list's rows, or those of JSON lines that are called .json, as many are."""
    with file.open(encoding="utf-8-sig") as stream:
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
            yield row
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
    with file.open(encoding="utf-8-sig") as stream:
        first = next((line for line in _pieces(stream) if line.strip()), "")
        try:
            json.loads(first)
        except ValueError:
            return False
        return any(line.strip() for line in _pieces(stream))


def _whole(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
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
    with file.open(encoding="utf-8-sig") as stream:
        header = stream.readline(LONGEST)
    return max(",;\t", key=header.count)


def _table_rows(file: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(LONGEST)
    delimiter = table_delimiter(file)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(_lines(stream), delimiter=delimiter, strict=True)
        try:
            reader.fieldnames = _header(file, reader.fieldnames or ())
            for row in reader:
                if None in row or None in row.values():
                    given = len([value for value in row.values() if value is not None])
                    found = given + len(row.get(None) or [None]) - 1 if None in row else given
                    raise DataFileError(
                        f"{file}, line {reader.line_num}: {found} fields, where its first line names "
                        f"{len(reader.fieldnames or ())}; put text that holds the separator in double quotes"
                    )
                yield row
        except (csv.Error, TooLongError) as error:
            raise DataFileError(f"{file}, line {reader.line_num + 1}: not a table: {error}") from None


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


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024, columns=_without_bytes(table)):
                yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataFileError(f"{file}: not a Parquet file: {str(error).splitlines()[0]}") from None


def _without_bytes(table: Any) -> list[str]:
    """The columns to read: of a picture that is stored in the table, its path and not its bytes."""
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
    """A Parquet file's columns, and which of them hold something else than text and numbers, such as pictures.

    Raises:
        DataFileError: Where it is no Parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataFileError(f"{file}: not a Parquet file: {str(error).splitlines()[0]}") from None

    def is_picture(kind: Any) -> bool:
        if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            return is_picture(kind.value_type)
        return bool(pyarrow.types.is_struct(kind) or pyarrow.types.is_binary(kind))

    return {field.name: is_picture(field.type) for field in schema}
