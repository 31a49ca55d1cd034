"""Hold out rows by image: no image is on both sides."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from lora_llava.core.errors import UserError
from lora_llava.data.encoded import EncodedTable
from lora_llava.data.images.image_id import ImageId
from lora_llava.data.images.image_names import COCO_NAME
from lora_llava.data.images.image_sources import BadImageError, FolderImages, ImageSource

_ENDS = 4096
"""Bytes at a file's start and end by which it is compared with others of its size; two files treated as one are only
kept on the same side."""


def row_keys(
    table: EncodedTable, images: ImageSource, source: int, digests: Mapping[str, str] | None = None
) -> list[list[Hashable]]:
    """Return what must not be on both sides of a split: a row's images, or, without any, its questions.

    Args:
        table: The source's rows.
        images: The source's images; a file with different names in two sources is one image.
        source: The source's index, which distinguishes images that are not files.
        digests: Hashes of images that are not files, by name, so that equal images are one.

    Returns:
        The keys of every row; none for a row that could not be read.
    """
    root = str(images.root) if isinstance(images, FolderImages) else None

    def key(name: str) -> Hashable:
        if digests is not None:
            return digests.get(name, ImageId(source, name))
        name = files.get(name, name)  # two names of one file are one image
        match = COCO_NAME.fullmatch(name.rpartition("/")[2])  # the same number is the same image in every release
        if match:
            return ("coco", match[1])
        return ImageId(source, os.path.normpath(name)) if root is None else os.path.normpath(os.path.join(root, name))

    every = dict.fromkeys(name for row in range(len(table)) for name in table.images(row))
    files = {name: images.label(name) for name in every} if isinstance(images, FolderImages) else {}
    same = _same_files(images, every) if isinstance(images, FolderImages) else {}
    keys: list[list[Hashable]] = []
    text: list[Hashable]
    for row in range(len(table)):
        ids, trained = table.row(row)
        text = [hashlib.sha256(ids[~trained].tobytes()).digest()] if len(ids) else []
        names = table.images(row)
        keys.append([key(name) for name in names] + [same[name] for name in names if name in same] or text)
    return keys


def _same_files(images: FolderImages, names: Iterable[str]) -> dict[str, Hashable]:
    """Return keys of possibly identical files: those of equal size, by the hash of their start and end."""
    sizes: dict[int, dict[Path, list[str]]] = {}
    for name in names:
        with contextlib.suppress(BadImageError, OSError):
            path = images.find(name)
            sizes.setdefault(path.stat().st_size, {}).setdefault(path, []).append(name)
    found: dict[str, Hashable] = {}
    for size, paths in sizes.items():
        for path, mine in paths.items() if len(paths) > 1 else ():
            with contextlib.suppress(OSError), path.open("rb") as file:
                digest = hashlib.sha256(file.read(_ENDS))
                file.seek(max(0, size - _ENDS))
                digest.update(file.read(_ENDS))
                found |= dict.fromkeys(mine, (size, digest.digest()))
    return found


def hold_back(
    keys: Sequence[Sequence[Hashable]], counts: Sequence[int], seed: int, names: Sequence[str]
) -> list[list[int]]:
    """Draw held-out rows; rows that are linked by shared images stay together.

    Args:
        keys: The keys of each row, from `row_keys`; rows with a common key stay on one side, and a row without keys is
            not drawn.
        counts: The least number of rows of each held-out part.
        seed: Seeds the draw.
        names: The recipe fields of the parts, for messages.

    Returns:
        Row indices in their original order: those that remain, then each held-out part.

    Raises:
        UserError: If nothing would be left to train on.
    """
    groups = link_rows(keys)
    parts = draw_groups(groups, [bool(mine) for mine in keys], counts, seed)
    taken = {groups[row] for part in parts for row in part}
    left = [row for row in range(len(keys)) if groups[row] not in taken]
    if not left:
        counted = ", ".join(f"{name} is {count}" for name, count in zip(names, counts, strict=True) if count)
        raise UserError(
            f"{counted}, but the data has only {len(keys)} rows in {len(set(groups))} groups by image; "
            "leave some to train on"
        )
    return [left, *parts]


def draw_groups(groups: Sequence[int], drawable: Sequence[bool], counts: Sequence[int], seed: int) -> list[list[int]]:
    """Draw parts of complete groups.

    Args:
        groups: The group of each row, from `link_rows`.
        drawable: Whether each row may be drawn; other rows come with their group alone.
        counts: The least number of rows of each part.
        seed: Seeds the draw.

    Returns:
        The row indices of each part in their original order; a part has fewer rows if there are no more.
    """
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    parts: list[list[int]] = []
    taken: set[int] = set()
    drawn = iter(order)
    for count in counts:
        part: list[int] = []
        while len(part) < count:
            row = next(drawn, -1)
            if row < 0:
                break
            if drawable[row] and groups[row] not in taken:
                taken.add(groups[row])
                part += members[groups[row]]
        parts.append(sorted(part))
    return parts


def link_rows(keys: Sequence[Sequence[Hashable]]) -> list[int]:
    """Return for every row the first row that it is linked to by keys, directly or through other rows."""
    parent = list(range(len(keys)))

    def find(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    owner: dict[Hashable, int] = {}
    for row, mine in enumerate(keys):
        for key in mine:
            first = owner.setdefault(key, row)
            low, high = sorted((find(first), find(row)))
            parent[high] = low
    return [find(row) for row in range(len(keys))]
