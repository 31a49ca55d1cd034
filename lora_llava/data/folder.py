"""Detection of the data in a folder: the file of rows, its format and columns, and the root of its images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.data.files.row_files import data_files, parquet_columns, placed_rows
from lora_llava.data.files.shards import SPLIT_WORDS, group_files, row_files, set_words
from lora_llava.data.formats import (
    CHAT_COLUMNS,
    FORMATS,
    IMAGE_COLUMNS,
    IMAGE_SUFFIXES,
    Columns,
    Detected,
    Format,
    RowError,
    Sample,
    likely_image_column,
    read_row,
)
from lora_llava.data.images.image_id import own_names
from lora_llava.data.images.image_names import walk_files
from lora_llava.data.images.image_sources import BadImageError, FolderImages

_ALIASES: dict[str, tuple[str, ...]] = {"image": IMAGE_COLUMNS, "id": ("id", "question_id", "key", "uid")}
for _format in FORMATS:
    _ALIASES |= _format.aliases
"""Names of columns found in the wild; the first that a table has counts."""
_PEEK = 500


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


def understand_folder(folder: Path, file: Path | None = None, follow_links: bool = False) -> FolderData:
    """Detect the data in a folder.

    Args:
        folder: A folder with images, at any depth, and a file of rows.
        file: The file of rows, if there are several.
        follow_links: Whether links in the folder may lead out of it.

    Returns:
        The data that was found.

    Raises:
        UserError: If the folder has no rows or several possible files of rows, the format of the rows is unknown, or
            none of their images exists.
    """
    if not folder.is_dir():
        raise UserError(
            f"the folder {folder} does not exist; name one with images and a table, or add --example to make one"
        )
    held_out: dict[str, Path] = {}
    if file is None:
        file, held_out = _choose(folder)
    files = data_files(file, "--data")
    file = files[0]
    first = [row for each in files for _, row in islice(placed_rows(each), _PEEK)]
    if not first:
        raise UserError(f"{file}: it has no rows; add lines such as image, question, answer")
    detected = _shape(file, first)
    form, columns = detected.choice, detected.columns
    embedded = file.suffix.lower() == ".parquet" and any(
        parquet_columns(each).get(name) for each in files for name in (columns.image, "images")
    )
    rows, names, linked = _count(files, form, columns, embedded)
    images = list(_images(folder, follow_links))
    root = _image_folder(folder, file, images, names, follow_links) if names and not embedded else None
    known = {"system", "images", *CHAT_COLUMNS, *vars(columns).values()}
    unused = tuple(str(name) for name in dict.fromkeys(key for row in first for key in row) if name not in known)
    return FolderData(
        file=file,
        validation=held_out.get("validation"),
        test=held_out.get("test"),
        form=form,
        shape=detected.shape,
        columns=columns,
        image_folder=root,
        rows=rows,
        images=len(images),
        named=len(names),
        embedded=embedded,
        unused=unused,
        files=files,
        linked=linked,
    )


def _choose(folder: Path) -> tuple[Path, dict[str, Path]]:
    """Return the file to train on, and the validation and test files by their names; of a set, its first file."""
    sets = [files[0] for files in group_files([*row_files(folder), *row_files(folder, deeper=True)])]
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
            "question"
        )
    names = ", ".join(str(file.relative_to(folder)) for file in left[:8])
    raise UserError(f"{folder} has {len(left)} possible files of rows: {names}; name one with --data")


def _shape(file: Path, rows: list[Any]) -> Detected:
    wrong = [type(row).__name__ for row in rows if not isinstance(row, Mapping)]
    if wrong:
        raise UserError(f"{file}: a row is {wrong[0]}; it should be an object with named fields")
    row: dict[str, Any] = {}
    for each in rows:  # a key may be missing where its value is empty
        row |= {key: value for key, value in each.items() if key not in row or row[key] in (None, "")}
    plain = {str(name).strip().lower(): str(name) for name in reversed(row)}
    found = {role: next((plain[name] for name in names if name in plain), None) for role, names in _ALIASES.items()}
    if found["image"] is None and "images" not in row:
        found["image"] = likely_image_column(row, set(filter(None, found.values())))
    sample = Sample(file, row, found)
    for each in FORMATS:
        detected = each.detect(sample)
        if detected is not None:
            return detected
    raise UserError(
        f"{file}: its columns are {', '.join(map(str, row))}; rename them to image, question, answer, or name them "
        "with data.columns in a copy of my_data_qlora.yaml"
    )


def _count(files: Iterable[Path], form: Format, columns: Columns, embedded: bool) -> tuple[int, dict[str, None], int]:
    """Count the rows, collect the images they name, and count the sets of images that no row links to each other.

    Rows with errors are skipped; the check reports them."""
    count = 0
    parent: dict[str, str] = {}

    def first_of(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    rows = (row for file in files for _, row in placed_rows(file))
    for count, row in enumerate(rows, 1):
        try:
            conversation = read_row(row, count - 1, form=form, columns=columns, embedded=embedded)
        except RowError:
            continue
        images = own_names(conversation.images)
        for name in images:
            parent.setdefault(name, name)
            parent[first_of(name)] = first_of(images[0])
    return count, dict.fromkeys(parent), sum(name == first for name, first in parent.items())


def _images(folder: Path, follow_links: bool) -> Iterator[Path]:
    files = map(Path, walk_files(folder, follow_links))
    return (file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)


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


def detect_shape(file: Path, rows: list[Any]) -> Detected:
    """Detect the format and the columns of rows.

    Args:
        file: Their file, for messages.
        rows: The first rows.

    Raises:
        UserError: If a row is not an object, or the columns are those of no known format.
    """
    return _shape(file, rows)
