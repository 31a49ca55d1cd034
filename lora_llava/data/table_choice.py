"""Choice of the table in a folder: train, validation and test files, cleaned copies, and tables that disagree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.data.files.row_files import DataFileError, data_files, placed_rows
from lora_llava.data.files.shards import SPLIT_WORDS, group_files, row_files, set_words
from lora_llava.data.folder_kinds.column_words import role_of
from lora_llava.data.folder_kinds.folder_kind import ROWS_FOLDER
from lora_llava.data.folder_kinds.label_files import first_of_list

_COMPARED = 100_000
_NAMED = 8


def table_sets(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the first file of each set of rows in a folder, and what is not used and why.

    The cleaned copy that `check --fix` wrote counts instead of its original if it is newer; else it is not used.
    """
    files = [*row_files(folder), *row_files(folder, deeper=True)]
    files = [file for file in files if ROWS_FOLDER not in file.relative_to(folder).parts]
    sets = [found[0] for found in group_files(files)]
    dropped: dict[Path, str] = {}
    for file in sets:
        original = file.with_name(file.name.replace(".fixed", "", 1))
        if original == file or original not in sets:
            continue
        if file.stat().st_mtime >= original.stat().st_mtime:
            dropped[original] = f"{original.name}, of which {file.name} is a newer copy without bad rows"
        else:
            dropped[file] = f"{file.name}, which is older than {original.name}; run check --fix again if rows are bad"
    return [file for file in sets if file not in dropped], list(dropped.values())


def is_table(file: Path) -> bool:
    """Check whether a file of another tool's folder may be a table of rows itself."""
    return file.suffix.lower() != ".json" or isinstance(first_of_list(file), dict)


def choose_table(folder: Path, sets: Sequence[Path]) -> tuple[Path, dict[str, Path]]:
    """Return the file to train on, and the validation and test files by their names; of a set, its first file.

    Raises:
        UserError: If there is none, or several; the message says whether they agree.
    """
    held_out: dict[str, Path] = {}
    for part in ("validation", "test"):
        mine = [file for file in sets if set_words(file, folder) & set(SPLIT_WORDS[part])]
        if len(mine) == 1 and len(sets) > 1:
            held_out[part] = data_files(mine[0], "--data")[0]
    left = [file for file in sets if file not in held_out.values()]
    if len(left) == 1:
        return left[0], held_out
    if held_out and not left:
        names = ", ".join(file.name for file in held_out.values())
        raise UserError(
            f"{folder} has only {names}, which seem to be held-out rows; name the rows to train on with --data"
        )
    if not left:
        raise UserError(
            f"{folder} has no table and no JSON; add a CSV with the columns image, question, answer and a row per "
            "question, or sort the images into a folder for each class"
        )
    names = ", ".join(str(file.relative_to(folder)) for file in left[:_NAMED])
    agreement = _agreement(left[0], left[1]) if len(left) == 2 else ""
    raise UserError(f"{folder} has {len(left)} possible files of rows: {names}; name one with --data{agreement}")


def _agreement(one: Path, other: Path) -> str:
    """Say whether two tables give the same answers; empty if they cannot be compared."""
    try:
        first, second = _answers(one), _answers(other)
    except (DataFileError, UnicodeError, OSError):
        return ""
    shared = first.keys() & second.keys()
    if not first or not second:
        return ""
    if not shared:
        return f" ({one.name} and {other.name} have no image in common)"
    differ = sorted(key for key in shared if first[key] != second[key])
    if not differ:
        return f" ({one.name} and {other.name} agree on all {len(shared):,} rows that they share)"
    key = differ[0]
    example = f"{' '.join(key)}: {'; '.join(sorted(first[key]))} / {'; '.join(sorted(second[key]))}"
    return f" ({one.name} and {other.name} disagree on {len(differ):,} of {len(shared):,} rows, such as {example})"


def _answers(file: Path) -> dict[tuple[str, ...], set[str]]:
    """Return the answers of a table by image and question."""
    found: dict[tuple[str, ...], set[str]] = {}
    for _, row in islice(placed_rows(file), _COMPARED):
        if not isinstance(row, dict):
            return {}
        roles = {role: column for column in reversed(row) if (role := role_of(str(column)))}
        answer = next((roles[role] for role in ("answer", "label", "caption") if role in roles), None)
        if "image" not in roles or answer is None:
            return {}
        key = tuple(_text(row[roles[role]]) for role in ("image", "question") if role in roles)
        found.setdefault(key, set()).add(_text(row[answer]))
    return found


def _text(value: Any) -> str:
    return str(value).strip()
