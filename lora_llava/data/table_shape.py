"""The shape of a table: which column names the image, the question, the answer, and whether a label is a class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError, nearest
from lora_llava.data.folder_kinds.column_words import plain_name, role_of, words_of
from lora_llava.data.folder_kinds.folder_kind import ConvertedFolder, FolderOptions, ImageFinder, LeftOut, split_named
from lora_llava.data.folder_kinds.label_tables import class_rows, label_kind, refuse_unlabelled
from lora_llava.data.formats import (
    CHAT_COLUMNS,
    FORMATS,
    IMAGE_COLUMNS,
    IMAGE_SUFFIXES,
    Columns,
    Detected,
    Format,
    Sample,
    extra_columns,
    likely_image_column,
)

_ALIASES: dict[str, tuple[str, ...]] = {"image": IMAGE_COLUMNS, "id": ("id", "question_id", "key", "uid")}
for _format in FORMATS:
    _ALIASES |= _format.aliases
"""Names of columns found in the wild; the first that a table has counts."""
ROLES = ("image", "question", "answer", "caption", "label", "id")
"""What a column may be, for `--columns`."""
_NONE = "(none)"
_TRIED = 50
"""Rows whose values are looked up among the images."""
_SPLIT_COLUMNS = ("split", "set", "subset", "partition", "dataset", "fold")


@dataclass(frozen=True)
class TableShape:
    """What a table's columns mean.

    Attributes:
        form: The value of `data.format`.
        shape: A description of the format.
        columns: The table's columns.
        label_column: The column of classes in a table without questions; None for other tables.
        header: The header that is a row itself, as a table without column names has one; None for other tables.
        facts: What was understood, as pairs of name and text.
        unused: Columns that are not read.
    """

    form: Format
    shape: str
    columns: Columns
    label_column: str | None = None
    header: tuple[str, ...] | None = None
    facts: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()


def table_shape(file: Path, rows: list[Any], options: FolderOptions, folder: Path | None = None) -> TableShape:
    """Detect what a table's columns mean.

    Args:
        file: The file, for messages.
        rows: Its first rows.
        options: What a person chose; on a terminal they are asked what cannot be detected.
        folder: The folder, for messages.

    Raises:
        UserError: If the columns are not understood; the message names the flag that says what they are.
    """
    wrong = [type(row).__name__ for row in rows if not isinstance(row, Mapping)]
    if wrong:
        raise UserError(f"{file}: a row is {wrong[0]}; it should be an object with named fields")
    row: dict[str, Any] = {}
    for each in rows:  # a key may be missing where its value is empty
        row |= {key: value for key, value in each.items() if key not in row or row[key] in (None, "")}
    if any(str(name).lower().endswith(IMAGE_SUFFIXES) for name in row):
        return _without_header(file, row, rows, options)
    roles = _roles(file, row, options)
    if not roles["image"] and not roles["question"] and not any(key in row for key in ("images", *CHAT_COLUMNS)):
        roles["image"] = _column_of_files(folder, rows, options)
    label = _label_column(row, roles, options)
    if label is not None:
        return _labelled(file, row, rows, roles, label, options)
    detected = _detect(file, row, roles)
    if detected is None:
        roles |= _asked_roles(file, row, options)
        detected = _detect(file, row, roles)
    if detected is None:
        raise UserError(_not_understood(file, row, roles))
    return TableShape(
        detected.choice,
        detected.shape,
        detected.columns,
        facts=_facts(detected, row),
        unused=_unused(row, detected),
    )


def _roles(file: Path, row: Mapping[str, Any], options: FolderOptions) -> dict[str, str | None]:
    """Return the column of each role: the person's, one of a known name, or one in another language."""
    options.used.add("columns")
    plain = {str(name).strip().lower(): str(name) for name in reversed(list(row))}
    found = {role: next((plain[name] for name in names if name in plain), None) for role, names in _ALIASES.items()}
    spelt = {plain_name(str(name)): str(name) for name in reversed(list(row))}
    taken = {name for name in found.values() if name}
    for role in found:
        words = (spelt[word] for word in words_of(role) if word in spelt)
        found[role] = found[role] or next((name for name in words if name not in taken), None)
    for role, name in options.columns.items():
        if role not in ROLES:
            raise UserError(
                f"--columns {role}={name}: {role} is not a role{nearest(role, ROLES)}; use {', '.join(ROLES)}"
            )
        exact = next((str(each) for each in row if plain_name(str(each)) == plain_name(name)), None)
        if exact is None:
            raise UserError(
                f"--columns {role}={name}: {file} has no column {name}{nearest(name, map(str, row))}; it has "
                f"{', '.join(map(str, row))}"
            )
        found = {other: None if column == exact else column for other, column in found.items()} | {role: exact}
    if found["image"] is None and "images" not in row and not any(key in row for key in CHAT_COLUMNS):
        found["image"] = likely_image_column(row, set(filter(None, found.values())))
    return found


def _column_of_files(folder: Path | None, rows: Sequence[Mapping[str, Any]], options: FolderOptions) -> str | None:
    """Return the column whose values are names of images in the folder, with or without their suffix."""
    if folder is None:
        return None
    finder = ImageFinder(folder, options.follow_links, LeftOut())
    for column in dict.fromkeys(str(name) for row in rows for name in row):
        names = [text for row in rows[:_TRIED] if (text := str(row.get(column) or "").strip()) and len(text) < 200]
        if names and sum(map(finder.exists, names)) >= 0.8 * len(names):
            return column
    return None


def _label_column(row: Mapping[str, Any], roles: Mapping[str, str | None], options: FolderOptions) -> str | None:
    """Return the column of labels of a table that has images, but neither questions nor captions."""
    if any(key in row for key in CHAT_COLUMNS) or not roles.get("image") or roles.get("caption"):
        return None
    if roles.get("question"):
        return None
    if "label" in options.columns or options.label_is:
        return roles.get("label") or roles.get("answer") or _by_word(row)
    others = [str(name) for name in row if name not in (roles["image"], roles.get("id"))]
    return roles.get("answer") or _by_word(row) or (others[0] if len(others) == 1 else None)


def _by_word(row: Mapping[str, Any]) -> str | None:
    return next((str(name) for name in row if role_of(str(name)) == "label"), None)


def _detect(file: Path, row: Mapping[str, Any], roles: Mapping[str, str | None]) -> Detected | None:
    known = {role: name for role, name in roles.items() if role != "label"}
    if not known.get("answer") and known.get("question"):
        known["answer"] = roles.get("label") or _by_word(row)
    sample = Sample(file, row, known)
    return next((found for each in FORMATS if (found := each.detect(sample)) is not None), None)


def _labelled(
    file: Path,
    row: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    roles: Mapping[str, str | None],
    label: str,
    options: FolderOptions,
) -> TableShape:
    """Decide whether a table of images and labels has classes or captions."""
    texts = [text for each in rows if (text := str(each.get(label) or "").strip())]
    kind, why = label_kind(texts, options, f"The column {label} of {file.name}")
    names = {role: name for role, name in roles.items() if name and role in ("image", "id")}
    columns = Columns(**names, caption=label)
    facts = (("columns", f"{columns.image} names the image, {label} is its label"), ("label", why))
    unused = tuple(str(name) for name in row if name not in (columns.image, label, columns.id))
    if kind == "caption":
        shape = f"captions: {columns.image}, {label}"
        return TableShape("captions", shape, columns, facts=facts, unused=unused)
    shape = f"a table of {columns.image}, {label}"
    return TableShape("conversations", shape, columns, label, facts=facts, unused=unused)


def _without_header(file: Path, row: Mapping[str, Any], rows: Sequence[Any], options: FolderOptions) -> TableShape:
    """Understand a table without a line of column names, by what its columns hold."""
    header = tuple(map(str, row))
    image = next(place for place, name in enumerate(header) if name.lower().endswith(IMAGE_SUFFIXES))
    if len(header) != 2:
        raise UserError(
            f"{file}, line 1: it holds {', '.join(header)[:80]} instead of column names; add a first line such as "
            "image,question,answer"
        )
    label = header[1 - image]
    texts = [label, *(str(each.get(label) or "").strip() for each in rows)]
    kind, why = label_kind(texts, options, f"The second column of {file.name}")
    if kind == "caption":
        raise UserError(
            f"{file}, line 1: it holds {', '.join(header)[:80]} instead of column names; add the line image,caption "
            "above it"
        )
    facts = (("columns", f"no names: {header[image]} and below name images, {label} and below are labels"),)
    columns = Columns(image=header[image])
    return TableShape("conversations", "a table", columns, label, header, (*facts, ("label", why)))


def _asked_roles(file: Path, row: Mapping[str, Any], options: FolderOptions) -> dict[str, str]:
    """Ask the person at the terminal what the columns are; nothing elsewhere."""
    names = [*map(str, row), _NONE]
    found = {}
    for role in ("image", "question", "answer"):
        chosen = options.asker.choose(f"Which column of {file.name} is the {role}?", names, None)
        if chosen is not None and chosen != _NONE:
            found[role] = chosen
    return found


def _not_understood(file: Path, row: Mapping[str, Any], roles: Mapping[str, str | None]) -> str:
    names = list(map(str, row))
    known = {role: name for role, name in roles.items() if name and role in ("image", "question", "answer")}
    rest = [name for name in names if name not in (*known.values(), roles.get("id"))]
    lacking = [role for role in ("image", "question", "answer") if role not in known]
    if len(rest) < len(lacking):
        lacking = ["image", "label"][-len(rest) :] if rest else lacking[:1]
    example = ",".join(f"{role}={name}" for role, name in zip(lacking, [*rest, "..."], strict=False))
    understood = "".join(f"; {name} is the {role}" for role, name in known.items())
    return (
        f"{file}: its columns are {', '.join(names)}{understood}; rename them to image, question, answer, or say which "
        f"is which, such as --columns {example}; if the folder of each image is its class, use --class-folders"
    )


def _read_roles(detected: Detected) -> dict[str, str]:
    """Return the columns that a format reads, by role."""
    captions = detected.choice == "captions"
    roles = ("image", "id", "caption") if captions else ("image", "id", "question", "answer")
    return {role: getattr(detected.columns, role) for role in roles}


def _facts(detected: Detected, row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Say which columns were understood, where their names are not ours, and which are for the score alone."""
    usual = vars(Columns())
    read = {role: name for role, name in _read_roles(detected).items() if name in row and role != "id"}
    words = {role: name for role, name in read.items() if name.strip() != usual[role]}
    columns = ", ".join(f"{name} is the {role}" for role, name in words.items())
    facts = (("columns", columns),) if columns else ()
    extra = ", ".join(extra_columns(row))
    return (*facts, ("for the score", extra)) if extra else facts


def _unused(row: Mapping[str, Any], detected: Detected) -> tuple[str, ...]:
    known = {"system", "images", *CHAT_COLUMNS, *_read_roles(detected).values(), *extra_columns(row)}
    return tuple(str(name) for name in row if name not in known)


def with_classes(
    converted: ConvertedFolder,
    shape: TableShape,
    rows: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]],
    options: FolderOptions,
    where: str,
) -> ConvertedFolder:
    """Give each row of a table of classes the question, and return the converted folder.

    Args:
        converted: What is known of the folder.
        shape: From `table_shape`.
        rows: The rows of each split with their places.
        options: What a person chose.
        where: The file, for messages.
    """
    found = replace(converted, splits={}, is_table=True, form="conversations", facts=list(converted.facts))
    found.facts += [fact for fact in shape.facts if fact not in found.facts]
    assert shape.label_column is not None  # the caller's condition
    if shape.header is not None:
        rows = {split: list(_with_first(each)) for split, each in rows.items()}
    title = "the second column" if shape.header is not None else shape.label_column
    class_rows(found, rows, (shape.columns.image, shape.label_column, title), options, where)
    count_unused(found, shape)
    refuse_unlabelled(found, where)
    return found


def _with_first(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield rows after the header, which is the first row of its file."""
    if rows:
        yield rows[0][0].rpartition(" line ")[0] + " line 1", {name: name for name in rows[0][1]}
    yield from rows


def count_unused(converted: ConvertedFolder, shape: TableShape) -> None:
    """Count the columns that are not read as left out; a column of splits is read."""
    divided = any(name == "splits" for name, _ in converted.facts)
    for name in shape.unused:
        if not (divided and _names_splits(name)):
            converted.left_out.add("columns that are not read", name)


def has_split_column(rows: Sequence[Any]) -> bool:
    """Check whether a table has a column that may name the split of each row."""
    return bool(rows) and any(map(_names_splits, rows[0]))


def _names_splits(column: object) -> bool:
    return str(column).strip().lower() in _SPLIT_COLUMNS


def by_split(
    rows: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]],
) -> tuple[dict[str, list[tuple[str, Mapping[str, Any]]]], str] | None:
    """Return a table's rows by the split that a column names, and the column; None without such a column.

    Args:
        rows: The rows of each split with their places; only training rows are divided.
    """
    train = rows.get("train", ())
    if len(rows) > 1 or not train:
        return None
    column = next(filter(_names_splits, train[0][1]), None)
    if column is None:
        return None
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {"train": []}
    splits = [split_named(str(row.get(column) or "")) for _, row in train]
    if not any(splits):
        return None
    for (place, row), split in zip(train, splits, strict=True):
        if split is None:
            raise UserError(
                f"{place}: {column} is {str(row.get(column) or '')!r}, and other rows have train, val or test; fill it "
                "in, or rename the column if it does not name splits"
            )
        found.setdefault(split, []).append((place, row))
    return (found, str(column)) if found["train"] and len(found) > 1 else None
