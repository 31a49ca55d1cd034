"""The data found in a folder: its description, and how its rows are counted and their images found."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import IMAGE_PLACEHOLDER
from lora_llava.data.folder_kinds.folder_kind import ConvertedFolder
from lora_llava.data.formats import Columns, Format, RowError, read_row
from lora_llava.data.images.image_id import own_names
from lora_llava.data.images.image_sources import BadImageError, FolderImages

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


def count_rows(
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


def absent_images(
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
        found.append(("missing images", f"{_counted(missing)}; check --fix leaves out such rows"))
    if bare:
        found.append(("without a row", _counted([file.name for file in bare]) + " not used"))
    return found


def _counted(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _MOST_NAMED else ""
    return f"{len(names):,} image{'s' * (len(names) != 1)} ({', '.join(names[:_MOST_NAMED])}{more})"


def image_root(folder: Path, file: Path, files: list[Path], names: Iterable[str], follow_links: bool) -> Path:
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
