"""Detection of the data in a folder: its kind, the file of rows, its format and columns, and the root of its images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.data.files.row_files import data_files, parquet_columns, placed_rows
from lora_llava.data.folder_data import FolderData, Placed, absent_images, count_rows, image_root
from lora_llava.data.folder_kinds import CLASS_FOLDERS, KINDS
from lora_llava.data.folder_kinds.folder_kind import (
    ROWS_FOLDER,
    SPLITS,
    ConvertedFolder,
    FolderKind,
    FolderOptions,
    ImageFinder,
    image_files,
    object_rows,
    plain_files,
)
from lora_llava.data.formats import (
    Columns,
    Format,
    RowError,
    read_row,
)
from lora_llava.data.images.image_id import own_names
from lora_llava.data.table_choice import choose_table, is_table, table_sets
from lora_llava.data.table_shape import TableShape, by_split, count_unused, has_split_column, table_shape, with_classes

_PEEK = 500


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
    options = replace(options or FolderOptions(), follow_links=follow_links, used=set())
    if not folder.is_dir():
        raise UserError(
            f"the folder {folder} does not exist; name one with images and a table, or add --example to make one"
        )
    if file is not None and not file.exists() and (folder / file).exists():
        file = folder / file
    kind, files, sets, unused = _kind_of(folder, file, options)
    if kind is not None:
        return _with_unused(_understand_kind(folder, kind, files, options), options)
    held_out: dict[str, Path] = {}
    if file is None:
        file, held_out = choose_table(folder, sets)
    found = _understand_table(folder, {"train": file, **held_out}, options)
    return _with_unused(replace(found, left_out=(*unused, *found.left_out)), options)


def _with_unused(found: FolderData, options: FolderOptions) -> FolderData:
    """Say which flags had no effect."""
    flags = options.without_effect()
    if not flags:
        return found
    text = f"{', '.join(flags)}, since the folder was read as {found.kind}"
    return replace(found, facts=(*found.facts, ("without effect", text)))


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
        rows = _divided({s: [(str(row["id"]), row) for row in each] for s, each in converted.splits.items()}, converted)
        shape = table_shape(files[0], [row for _, row in rows["train"][:_PEEK]], options, folder)
        columns = shape.columns
        converted.facts += shape.facts
        if shape.label_column is not None:
            rows = _with_images(folder, files[0], rows, shape, options, converted)
            converted, columns = with_classes(converted, shape, rows, options, files[0].name), Columns()
        else:
            converted.form = shape.form
            count_unused(converted, shape)
    return _describe(folder, files[0], converted, columns, options)


def _understand_table(folder: Path, given: Mapping[str, Path], options: FolderOptions) -> FolderData:
    """Describe tables that training reads as they are, or convert them where they have no question."""
    sets = {split: data_files(file, "--data") for split, file in given.items()}
    files = sets["train"]
    first = [row for each in files for _, row in islice(placed_rows(each), _PEEK)]
    if not first:
        raise UserError(f"{files[0]}: it has no rows; add lines such as image, question, answer")
    shape = table_shape(files[0], first, options, folder)
    if shape.label_column is not None:
        _refuse_embedded(files, shape)
        rows = {split: [each for file in mine for each in object_rows(file)] for split, mine in sets.items()}
        converted = ConvertedFolder("a table")
        rows = _divided(rows, converted)
        rows = _with_images(folder, files[0], rows, shape, options, converted)
        converted = with_classes(converted, shape, rows, options, files[0].name)
        return _describe(folder, files[0], converted, Columns(), options)
    columns, form = shape.columns, shape.form
    converted = ConvertedFolder("a table", form=form, is_table=True, facts=list(shape.facts))
    if has_split_column(first) and len(sets) == 1 and files[0].suffix.lower() != ".parquet":
        rows = _divided({"train": [each for file in files for each in object_rows(file)]}, converted)
        if len(rows) > 1:
            converted.splits = {split: [{"id": at, **row} for at, row in each] for split, each in rows.items()}
            count_unused(converted, shape)
            return _describe(folder, files[0], converted, columns, options)
    embedded = _is_embedded(files, columns)
    placed = chain.from_iterable(map(placed_rows, files))
    rows_count, names, linked, examples = count_rows(placed, form, columns, embedded)
    images = list(image_files(folder, options.follow_links))
    root = image_root(folder, files[0], images, names, options.follow_links) if names and not embedded else None
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
        facts=(*shape.facts, *absent_images(root, images, named, options.follow_links)),
        examples=examples,
        kind="a file of conversations" if shape.shape.startswith("conversations") else "a table",
    )


def _divided(rows: dict[str, list[Placed]], converted: ConvertedFolder) -> dict[str, list[Placed]]:
    """Return a table's rows by the splits that one of its columns names, if there is one, and say so."""
    found = by_split(rows)
    if found is None:
        return rows
    divided, column = found
    converted.facts.append(("splits", f"{column} names the split of each row"))
    return {split: list(each) for split, each in divided.items()}


def _is_embedded(files: Sequence[Path], columns: Columns) -> bool:
    """Whether the images are in the table itself."""
    return files[0].suffix.lower() == ".parquet" and any(
        parquet_columns(each).get(name) for each in files for name in (columns.image, "images")
    )


def _refuse_embedded(files: Sequence[Path], shape: TableShape) -> None:
    """Refuse labels beside images in the table itself, to whose rows no question can be added."""
    if _is_embedded(files, shape.columns):
        raise UserError(
            f"{files[0]}: its images are in the table itself, with the label {shape.label_column} and no question; "
            f"add a column question and rename {shape.label_column} to answer, or write the images to a folder for "
            "each label"
        )


def _names_in(files: Iterable[Path], form: Format, columns: Columns) -> dict[str, None]:
    return count_rows(chain.from_iterable(map(placed_rows, files)), form, columns, False)[1]


def _describe(
    folder: Path, file: Path, converted: ConvertedFolder, columns: Columns, options: FolderOptions
) -> FolderData:
    """Describe rows that are still to be written."""
    target = folder / ROWS_FOLDER
    images = list(image_files(folder, options.follow_links))
    if converted.is_table:
        _leave_out_unusable(folder, file, converted, columns, images, options)
    rows = converted.splits["train"]
    placed = ((str(row["id"]), row) for row in rows)
    count, names, linked, examples = count_rows(placed, converted.form, columns, False)
    held_out = chain.from_iterable(converted.splits.get(split, ()) for split in SPLITS[1:])
    named = dict.fromkeys(names)
    named |= count_rows(((str(row["id"]), row) for row in held_out), converted.form, columns, False)[1]
    if converted.packed:
        root: Path | None = target / "images"
        absent: list[tuple[str, str]] = []
    else:
        root = image_root(folder, file, images, names, options.follow_links) if names else None
        absent = absent_images(root, () if converted.counts_images else images, named, options.follow_links)
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
        named=len(named),
        files=(target / "train.jsonl",),
        linked=linked,
        kind=converted.shape,
        split_rows={split: len(converted.splits[split]) for split in SPLITS if converted.splits.get(split)},
        facts=(*converted.facts, *absent),
        left_out=tuple(converted.left_out.lines()),
        examples=examples,
        converted=converted,
    )


def _with_images(
    folder: Path,
    file: Path,
    rows: Mapping[str, list[Placed]],
    shape: TableShape,
    options: FolderOptions,
    converted: ConvertedFolder,
) -> dict[str, list[Placed]]:
    """Return the rows of a table of labels whose images are in the folder, or that name none; count the others."""

    def name_of(row: Any) -> str:
        return str(row.get(shape.columns.image) or "").strip()

    names = dict.fromkeys(name for each in rows.values() for _, row in each if (name := name_of(row)))
    images = list(image_files(folder, options.follow_links))
    root = image_root(folder, file, images, names, options.follow_links) if names else folder
    finder = ImageFinder(root, options.follow_links, converted.left_out)
    there = {name for name in names if finder.exists(name)}
    found: dict[str, list[Placed]] = {}
    for split, each in rows.items():
        found[split] = [(place, row) for place, row in each if name_of(row) in there or not name_of(row)]
        for name in (name for _, row in each if (name := name_of(row)) and name not in there):
            finder.find(name, what="rows")  # counts it, with the reason
    return found


def _leave_out_unusable(
    folder: Path,
    file: Path,
    converted: ConvertedFolder,
    columns: Columns,
    images: list[Path],
    options: FolderOptions,
) -> None:
    """Leave out rows of a table that cannot be read, or whose images are not in the folder, and count them."""
    every = [(str(row["id"]), row) for rows in converted.splits.values() for row in rows]
    names = count_rows(every, converted.form, columns, False)[1]
    root = image_root(folder, file, images, names, options.follow_links) if names else folder
    finder = ImageFinder(root, options.follow_links, converted.left_out)
    for split, rows in converted.splits.items():
        kept = []
        for row in rows:
            try:
                conversation = read_row(row, 0, form=converted.form, columns=columns)
            except RowError as error:
                converted.left_out.add(f"rows with the problem: {error.kind}", row["id"])
                continue
            images_of = [finder.find(name, what="rows") for name in own_names(conversation.images)]
            if None not in images_of:
                is_name = isinstance(row.get(columns.image), str) and len(images_of) == 1
                kept.append(row | {columns.image: images_of[0]} if is_name else row)
        converted.splits[split] = kept
    if not converted.splits["train"]:
        raise UserError(f"{file}: no row can be used; {'; '.join(converted.left_out.lines())}; correct them")
