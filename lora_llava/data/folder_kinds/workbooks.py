"""Workbooks of Excel and LibreOffice: one sheet becomes a table, read with python-calamine."""

from __future__ import annotations

import datetime
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError, nearest
from lora_llava.data.folder_kinds.column_words import role_of
from lora_llava.data.folder_kinds.folder_kind import (
    ConvertedFolder,
    FolderKind,
    FolderOptions,
    number_of,
    split_named,
    split_of,
)

_SUFFIXES = (".xlsx", ".xlsm", ".xls", ".xlsb", ".ods")
_MOST_BYTES = 1 << 30
"""Most bytes of a workbook's sheets, unpacked."""
_HEADER_ROWS = 20
"""Rows among which the line with column names is searched for; above it there may be a title."""


class Workbooks(FolderKind):
    """`.xlsx`, `.ods` and Excel's older formats."""

    summary = "a workbook"

    def find(self, folder: Path, files: Sequence[Path]) -> list[Path]:
        return [file for file in files if file.suffix.lower() in _SUFFIXES and not file.name.startswith("~$")]

    def convert(self, folder: Path, files: Sequence[Path], options: FolderOptions) -> ConvertedFolder:
        found = ConvertedFolder(self.summary, is_table=True)
        by_split: dict[str, list[Path]] = {}
        for file in files:
            by_split.setdefault(split_of(file, folder), []).append(file)
        for split, mine in by_split.items():
            if len(mine) > 1:
                names = ", ".join(file.name for file in mine)
                raise UserError(f"{folder} has {len(mine)} workbooks for {split}: {names}; name one with --data")
            for sheet_split, name, rows in _sheets(mine[0], options, found):
                for row in rows:
                    found.add(sheet_split or split, row)
                found.facts.append(("sheet", f"{name} of {mine[0].name}, {number_of(len(rows), 'row')}"))
        return found


def _sheets(
    file: Path, options: FolderOptions, found: ConvertedFolder
) -> list[tuple[str | None, str, list[dict[str, Any]]]]:
    """Return the sheets to read: the one that was chosen, the only one with rows, or those of the splits."""
    tables = {name: _table(cells, name) for name, cells in _read_cells(file).items()}
    if options.sheet is not None:
        options.used.add("sheet")
        if options.sheet not in tables:
            raise UserError(
                f"--sheet {options.sheet}: {file} has no such sheet{nearest(options.sheet, tables)}; it has "
                f"{', '.join(tables)}"
            )
        return [(None, options.sheet, _checked(file, options.sheet, tables[options.sheet]))]
    filled = {name: rows for name, rows in tables.items() if rows}
    for name in (name for name in tables if name not in filled):
        found.left_out.add("sheets without rows", name)
    if not filled:
        raise UserError(f"{file}: no sheet has rows; the first row should name columns such as image, question, answer")
    splits = {name: split_named(name) for name in filled}
    if len(filled) > 1 and all(splits.values()) and len(set(splits.values())) == len(filled):
        return [(splits[name], name, rows) for name, rows in filled.items()]
    return [_chosen(file, filled, options, found)]


def _chosen(
    file: Path, filled: dict[str, list[dict[str, Any]]], options: FolderOptions, found: ConvertedFolder
) -> tuple[str | None, str, list[dict[str, Any]]]:
    """Return one of several sheets: the only one whose columns are understood, else the one a person chooses."""
    fitting = [name for name, rows in filled.items() if _fits(rows[0], options)]
    if len(filled) == 1:
        name: str | None = next(iter(filled))
    elif len(fitting) == 1:
        name = fitting[0]
    else:
        names = fitting or list(filled)
        name = options.asker.choose(f"{file.name} has several sheets. Which one has the rows?", names, None)
    if name is None:
        listed = ", ".join(f"{each} ({number_of(len(rows), 'row')})" for each, rows in filled.items())
        raise UserError(f"{file} has several sheets: {listed}; name one with --sheet")
    for other in (other for other in filled if other != name):
        found.left_out.add("rows of other sheets, read with --sheet", other, len(filled[other]))
    return None, name, filled[name]


def _fits(row: dict[str, Any], options: FolderOptions) -> bool:
    named = set(options.columns.values())
    roles = {role_of(column) for column in row} | ({"image"} if named & row.keys() else set())
    return "image" in roles and (len(roles - {None, "image"}) > 0 or bool(named & row.keys()))


def _read_cells(file: Path) -> dict[str, list[list[Any]]]:
    """Return the cells of each sheet.

    Raises:
        UserError: If the library is missing, or the file is not a workbook or is too large.
    """
    try:
        import python_calamine
    except ImportError:
        raise UserError(
            f"{file} is a workbook, which needs python-calamine: pip install 'lora_llava[excel]'; or save its sheet as "
            "CSV"
        ) from None
    try:
        size = _unpacked_size(file)
        if size <= _MOST_BYTES:
            book = python_calamine.load_workbook(file)
            return {name: book.get_sheet_by_name(name).to_python() for name in book.sheet_names}
    except Exception as error:  # calamine has an error for each format and library below it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file}: not a workbook, damaged, or protected by a password: {reason}; save it again, or as CSV"
        ) from None
    raise UserError(f"{file}: its sheets have {size:,} bytes unpacked; save the sheet of rows as CSV")


def _unpacked_size(file: Path) -> int:
    """Return the bytes of the sheets of a workbook, unpacked; 0 for one that is not an archive."""
    if not zipfile.is_zipfile(file):
        return 0
    with zipfile.ZipFile(file) as packed:
        return sum(each.file_size for each in packed.infolist() if each.filename.endswith(".xml"))


def _table(cells: Sequence[Sequence[Any]], sheet: str) -> list[dict[str, Any]]:
    """Return a sheet's rows below the line with column names, each with its number as id if it has none."""
    head = _header_line(cells)
    if head is None:
        return []
    names = [_text(value) or f"(column {place})" for place, value in enumerate(cells[head], 1)]
    names = [name if names.index(name) == place else f"{name} ({place + 1})" for place, name in enumerate(names)]
    used = [place for place in range(len(names)) if any(_text(row[place]) for row in cells[head:] if place < len(row))]
    rows = []
    for number, row in enumerate(cells[head + 1 :], head + 2):
        values = {names[place]: _text(row[place]) if place < len(row) else "" for place in used}
        if any(values.values()):
            rows.append({"id": f"{sheet} row {number}"} | {key: value for key, value in values.items() if key != "id"})
    return rows


def _header_line(cells: Sequence[Sequence[Any]]) -> int | None:
    """Return the first line with the name of a known column; else the first with two cells filled, or any."""
    filled = [(place, [text for value in row if (text := _text(value))]) for place, row in enumerate(cells)]
    lines = [(place, texts) for place, texts in filled[:_HEADER_ROWS] if texts]
    known = [place for place, texts in lines if len(texts) > 1 and sum(role_of(text) is not None for text in texts) > 1]
    several = [place for place, texts in lines if len(texts) > 1]
    return next(iter([*known, *several, *(place for place, _ in lines)]), None)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return "" if value is None else str(value).strip()


def _checked(file: Path, sheet: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not rows:
        raise UserError(f"--sheet {sheet}: this sheet of {file} has no rows below a line of column names; fill it in")
    return rows
