"""Detection of the data in a folder: its kind, the file of rows, its format and columns, and the root of its images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import IMAGE_PLACEHOLDER
from lora_llava.data.files.row_files import data_files, parquet_columns, placed_rows
from lora_llava.data.folder_kinds import CLASS_FOLDERS, KINDS
from lora_llava.data.folder_kinds.folder_kind import (
    ROWS_FOLDER,
    SPLITS,
    ConvertedFolder,
    FolderKind,
    FolderOptions,
    image_files,
    plain_files,
)
from lora_llava.data.formats import (
    Columns,
    Format,
    RowError,
    read_row,
)
from lora_llava.data.images.image_id import own_names
from lora_llava.data.images.image_sources import BadImageError, FolderImages
from lora_llava.data.table_choice import choose_table, is_table, table_sets
from lora_llava.data.table_shape import TableShape, table_shape, with_classes

_PEEK = 500
_MOST_NAMED = 3
Placed = tuple[str, Any]
"""The place and the content of a row."""


@dataclass(frozen=True)
class FolderData:
    """The data found in a folder.

    Attributes:
        file: The file of training rows.
        validation: A file of validation rows; None if they are split off from the training rows.
        test: A file of test rows; None if none exists.
        form: The value of `data.format`.
        shape: A description of the format.
        columns: The names of the table's columns.
        image_folder: Root folder of the images; None if no row has one.
        rows: Number of rows in `file`.
        images: Number of image files under the folder.
        named: Number of different images that rows name.
        embedded: Whether the images are in the table itself.
        unused: Columns that are not read.
        files: All files of the set of which `file` is the first.
        linked: Number of sets of images that no row links to each other; the rows of a set are held out together.
        kind: The kind of folder, such as "class folders".
        split_rows: The number of rows of each split.
        facts: What else was understood, as pairs of name and text.
        left_out: What is left out, one line for each reason, with its count.
        examples: Image, question and answer of two rows.
        converted: The rows to write where the folder is not a table; None if training reads the table itself.
    """

    file: Path
    validation: Path | None
    test: Path | None
    form: Format
    shape: str
    columns: Columns
    image_folder: Path | None
    rows: int
    images: int
    named: int
    embedded: bool = False
    unused: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    linked: int = 0
    kind: str = "a table"
    split_rows: Mapping[str, int] = field(default_factory=dict)
    facts: tuple[tuple[str, str], ...] = ()
    left_out: tuple[str, ...] = ()
    examples: tuple[tuple[str, str, str], ...] = ()
    converted: ConvertedFolder | None = None


def understand_folder(
    folder: Path, file: Path | None = None, follow_links: bool = False, options: FolderOptions | None = None
) -> FolderData:
    """Detect the data in a folder.

    Args:
        folder: A folder with images, at any depth, and a file of rows or labels; or class folders.
        file: The file of rows, if there are several.
        follow_links: Whether links in the folder may lead out of it.
        options: What else a person chose.

    Returns:
        The data that was found. Nothing is written.

    Raises:
        UserError: If the folder has no rows or several possible files of rows, the format of the rows is unknown, or
            none of their images exists.
    """
    options = replace(options or FolderOptions(), follow_links=follow_links)
    if not folder.is_dir():
        raise UserError(
            f"the folder {folder} does not exist; name one with images and a table, or add --example to make one"
        )
    if file is not None and not file.exists() and (folder / file).exists():
        file = folder / file
    kind, files, sets, unused = _kind_of(folder, file, options)
    if kind is not None:
        return _understand_kind(folder, kind, files, options)
    held_out: dict[str, Path] = {}
    if file is None:
        file, held_out = choose_table(folder, sets)
    found = _understand_table(folder, {"train": file, **held_out}, options)
    return replace(found, left_out=(*unused, *found.left_out))


def _kind_of(
    folder: Path, file: Path | None, options: FolderOptions
) -> tuple[FolderKind | None, list[Path], list[Path], list[str]]:
    """Return the kind of folder with its files, or no kind and the sets of tables; and what is not used.

    Raises:
        UserError: If the folder has files of several kinds.
    """
    if options.class_folders:
        return CLASS_FOLDERS, [folder], [], []
    if file is not None:
        claims = [(kind, found) for kind in KINDS if file.is_file() and (found := kind.find(folder, [file]))]
        return (*claims[0], [], []) if claims else (None, [], [], [])
    listed = plain_files(folder)
    claims = [(kind, found) for kind in KINDS if (found := kind.find(folder, listed))]
    sets, unused = table_sets(folder)
    claimed = {each for _, found in claims for each in found}
    tables = [each for each in sets if each not in claimed and (not claims or is_table(each))]
    if claims and (len(claims) > 1 or tables):
        choices = [f"{kind.summary} ({found[0].relative_to(folder)})" for kind, found in claims]
        choices += [f"a table ({each.relative_to(folder)})" for each in tables[:3]]
        raise UserError(f"{folder} has {' and '.join(choices)}; name the file to use with --data")
    if claims:
        return (*claims[0], [], unused)
    if not tables and CLASS_FOLDERS.find(folder, listed):
        return CLASS_FOLDERS, [folder], [], unused
    return None, [], tables, unused


def _understand_kind(folder: Path, kind: FolderKind, files: list[Path], options: FolderOptions) -> FolderData:
    """Convert a folder of another kind than a table, and describe the rows."""
    converted = kind.convert(folder, files, options)
    if not converted.splits.get("train"):
        reasons = "; ".join(converted.left_out.lines())
        raise UserError(
            f"{folder}: {kind.summary}, but no row to train on is left{': ' if reasons else ''}{reasons}; add images "
            "and labels for training"
        )
    columns = Columns()
    if converted.is_table:
        rows = {split: [(str(row["id"]), row) for row in each] for split, each in converted.splits.items()}
        shape = table_shape(files[0], [row for _, row in rows["train"][:_PEEK]], options, folder)
        columns = shape.columns
        converted.facts += shape.facts
        if shape.label_column is not None:
            converted, columns = with_classes(converted, shape, rows, options, files[0].name), Columns()
        else:
            converted.form = shape.form
            converted.left_out = _with_unused(converted, shape)
    return _describe(folder, files[0], converted, columns, options)


def _with_unused(converted: ConvertedFolder, shape: TableShape) -> Any:
    for name in shape.unused:
        converted.left_out.add("columns that are not read", name)
    return converted.left_out


def _understand_table(folder: Path, given: Mapping[str, Path], options: FolderOptions) -> FolderData:
    """Describe tables that training reads as they are, or convert them where they have no question."""
    sets = {split: data_files(file, "--data") for split, file in given.items()}
    files = sets["train"]
    first = [row for each in files for _, row in islice(placed_rows(each), _PEEK)]
    if not first:
        raise UserError(f"{files[0]}: it has no rows; add lines such as image, question, answer")
    shape = table_shape(files[0], first, options, folder)
    if shape.label_column is not None:
        rows = {split: [each for file in mine for each in _named_rows(file)] for split, mine in sets.items()}
        converted = with_classes(ConvertedFolder("a table"), shape, rows, options, files[0].name)
        return _describe(folder, files[0], converted, Columns(), options)
    columns, form = shape.columns, shape.form
    embedded = files[0].suffix.lower() == ".parquet" and any(
        parquet_columns(each).get(name) for each in files for name in (columns.image, "images")
    )
    placed = chain.from_iterable(map(placed_rows, files))
    rows_count, names, linked, examples = _count(placed, form, columns, embedded)
    images = list(image_files(folder, options.follow_links))
    root = _image_folder(folder, files[0], images, names, options.follow_links) if names and not embedded else None
    others = {split: sum(1 for each in mine for _ in placed_rows(each)) for split, mine in sets.items()}
    held_out = [each for split, mine in sets.items() if split != "train" for each in mine]
    named = dict.fromkeys(names) | _names_in(held_out, form, columns)
    return FolderData(
        file=files[0],
        validation=given.get("validation"),
        test=given.get("test"),
        form=form,
        shape=shape.shape,
        columns=columns,
        image_folder=root,
        rows=rows_count,
        images=len(images),
        named=len(names),
        embedded=embedded,
        unused=shape.unused,
        files=files,
        linked=linked,
        split_rows=others,
        facts=(*shape.facts, *_absent(root, images, named, options.follow_links)),
        examples=examples,
    )


def _named_rows(file: Path) -> list[Placed]:
    return [(f"{file.name} {place}", row) for place, row in placed_rows(file)]


def _names_in(files: Iterable[Path], form: Format, columns: Columns) -> dict[str, None]:
    return _count(chain.from_iterable(map(placed_rows, files)), form, columns, False)[1]


def _describe(
    folder: Path, file: Path, converted: ConvertedFolder, columns: Columns, options: FolderOptions
) -> FolderData:
    """Describe rows that are still to be written."""
    target = folder / ROWS_FOLDER
    rows = converted.splits["train"]
    placed = ((str(row["id"]), row) for row in rows)
    count, names, linked, examples = _count(placed, converted.form, columns, False)
    images = list(image_files(folder, options.follow_links))
    held_out = chain.from_iterable(converted.splits.get(split, ()) for split in SPLITS[1:])
    named = dict.fromkeys(names)
    named |= _count(((str(row["id"]), row) for row in held_out), converted.form, columns, False)[1]
    if converted.packed:
        root: Path | None = target / "images"
        absent: list[tuple[str, str]] = []
    else:
        root = _image_folder(folder, file, images, names, options.follow_links) if names else None
        absent = _absent(root, () if converted.counts_images else images, named, options.follow_links)
    return FolderData(
        file=target / "train.jsonl",
        validation=target / "validation.jsonl" if converted.splits.get("validation") else None,
        test=target / "test.jsonl" if converted.splits.get("test") else None,
        form=converted.form,
        shape=converted.shape,
        columns=columns,
        image_folder=root,
        rows=count,
        images=len(converted.packed) or len(images),
        named=len(names),
        files=(target / "train.jsonl",),
        linked=linked,
        kind=converted.shape,
        split_rows={split: len(converted.splits[split]) for split in SPLITS if converted.splits.get(split)},
        facts=(*converted.facts, *absent),
        left_out=tuple(converted.left_out.lines()),
        examples=examples,
        converted=converted,
    )


def _absent(
    root: Path | None, images: Sequence[Path], names: Iterable[str], follow_links: bool
) -> list[tuple[str, str]]:
    """Count the images that no row names, and the names that no image has."""
    if root is None:
        return []
    finder = FolderImages(root, 1, follow_links=follow_links)
    missing, used = [], set()
    for name in names:
        try:
            path = finder.find(name)
            used.add(path)
            if not path.is_file():
                missing.append(name)
        except (BadImageError, OSError):
            missing.append(name)
    bare = [file for file in images if file.resolve() not in used]
    found = []
    if missing:
        found.append(("missing images", f"{_counted(missing)}; check --fix leaves their rows out"))
    if bare:
        found.append(("without a row", _counted([file.name for file in bare]) + " not used"))
    return found


def _counted(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _MOST_NAMED else ""
    return f"{len(names):,} image{'s' * (len(names) != 1)} ({', '.join(names[:_MOST_NAMED])}{more})"


def _count(
    rows: Iterable[Placed], form: Format, columns: Columns, embedded: bool
) -> tuple[int, dict[str, None], int, tuple[tuple[str, str, str], ...]]:
    """Count the rows, collect the images they name, count the sets of images that no row links to each other, and
    choose two examples, with different answers if there are.

    Rows with errors are skipped; the check reports them."""
    count = 0
    parent: dict[str, str] = {}
    examples: list[tuple[str, str, str]] = []

    def first_of(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for count, (_, row) in enumerate(rows, 1):
        try:
            conversation = read_row(row, count - 1, form=form, columns=columns, embedded=embedded)
        except RowError:
            continue
        images = own_names(conversation.images)
        for name in images:
            parent.setdefault(name, name)
            parent[first_of(name)] = first_of(images[0])
        if len(examples) < 2 or examples[0][2] == examples[1][2]:
            texts = [turn.text for turn in conversation.turns if turn.role != "system"]
            question = texts[0].replace(IMAGE_PLACEHOLDER, "").strip()
            examples = [*examples[: 1 if len(examples) == 2 else 2], (", ".join(images), question, texts[1])]
    linked = sum(name == first for name, first in parent.items())
    return count, dict.fromkeys(parent), linked, tuple(examples)


def _image_folder(folder: Path, file: Path, files: list[Path], names: Iterable[str], follow_links: bool) -> Path:
    """Return the folder under which most of the named images exist; among equals, the one with most exact names."""
    names = list(islice(names, _PEEK))
    roots = dict.fromkeys([folder, file.parent, folder / "images"])
    for image in files:
        roots |= dict.fromkeys(parent for parent in image.parents if parent.is_relative_to(folder))
        if len(roots) > 100:
            break

    def hits(root: Path) -> tuple[int, int]:
        images = FolderImages(root, 1, follow_links=follow_links)
        found = [_how_found(images, name) for name in names]
        return len(found) - found.count(None), found.count("as named")

    best = max((root for root in roots if root.is_dir()), key=hits)
    if not hits(best)[0]:
        if link := _link_out(folder):
            raise UserError(
                f"{file}: none of its first {len(names)} images is under {folder}, and the link {link} leads out of "
                "it, which is not followed; add --follow-links, which writes data.follow_links: true into the recipe"
            )
        raise UserError(
            f"{file}: its first row with an image names {names[0]}, and none of its first {len(names)} images is "
            f"under {folder}, which has {len(files)} images; put them there"
        )
    return best


def _how_found(images: FolderImages, name: str) -> str | None:
    try:
        if not images.find(name).is_file():
            return None
        return "as named" if images.matched(name) is None else "matched"
    except (BadImageError, OSError):
        return None


def _link_out(folder: Path) -> Path | None:
    """Return a link in a folder that leads out of it; None if none does."""
    root = folder.resolve()
    for where, below, files in os.walk(folder):
        for path in (Path(where, name) for name in (*below, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                return path
    return None
