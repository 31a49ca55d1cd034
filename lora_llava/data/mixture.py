"""Several sources as one training set: what is held back, by image, and what of each source an epoch takes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_llava.core.errors import UserError
from lora_llava.data.encoded import EncodedTable
from lora_llava.data.images.image_names import COCO_NAME
from lora_llava.data.images.reading import BadImageError, FolderImages, ImageSource

_ENDS = 4096
"""Bytes of a file's beginning and end that tell it from others of its size; two taken for one would only share a
side."""


def row_keys(
    table: EncodedTable, images: ImageSource, source: int, digests: Mapping[str, str] | None = None
) -> list[list[Hashable]]:
    """What of each row must not be on both sides of a split: its images, or, without any, its questions.

    Args:
        table: The source's rows.
        images: The source's images; the same file under two sources' names is one image.
        source: The source's place, which tells images apart that are no files.
        digests: What images that are no files hold, by name, so that the same one in two rows is one.

    Returns:
        The keys of every row; none of one that could not be read.
    """
    root = str(images.root) if isinstance(images, FolderImages) else f"{source}|"

    def key(name: str) -> Hashable:
        if digests is not None:
            return digests.get(name, (source, name))
        name = files.get(name, name)  # two names that are matched to one file are one image
        match = COCO_NAME.fullmatch(name.rpartition("/")[2])  # the same number is the same image in every release
        return ("coco", match[1]) if match else os.path.normpath(os.path.join(root, name))

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
    """Keys of files that other names have too: those of one size whose beginnings and ends are the same."""
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
    """Draw rows that are not trained on; rows that share an image, or images in turn, stay together.

    Args:
        keys: What each row must share a side with, from `row_keys`; a row without any is not drawn.
        counts: How many rows, at the least, go to each held-back part.
        seed: Draws them.
        names: The fields that ask for the parts, for messages.

    Returns:
        Row indices in their old order: those that are left, then each held-back part.

    Raises:
        UserError: Where nothing would be left to train on.
    """
    groups = _groups(keys)
    order = list(range(len(keys)))
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
            if keys[row] and groups[row] not in taken:
                taken.add(groups[row])
                part += members[groups[row]]
        parts.append(sorted(part))
    left = [row for row in range(len(keys)) if groups[row] not in taken]
    if not left:
        asked = ", ".join(f"{name} is {count}" for name, count in zip(names, counts, strict=True) if count)
        raise UserError(
            f"{asked}, of {len(keys)} rows, which have {len(members)} images or sets of them; leave some to train on"
        )
    return [left, *parts]


def _groups(keys: Sequence[Sequence[Hashable]]) -> list[int]:
    """For every row the first row that it is linked to by keys, directly or in turn."""
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


@dataclass(frozen=True)
class Share:
    """What a mixture is to have of a source.

    Attributes:
        name: The source's.
        weight: Its part of an epoch, in proportion to the other weights.
        rows: Or how many of its rows an epoch has.
    """

    name: str
    weight: float | None = None
    rows: int | None = None


def epoch_counts(shares: Sequence[Share], available: Sequence[int], total: int | None) -> list[int]:
    """How many rows of each source an epoch has.

    Args:
        shares: What is asked for; a source with neither weight nor rows gives all it has.
        available: Rows that each source has.
        total: Rows of an epoch; None: as many as the sources that have a weight hold, and what the others give.

    Returns:
        Rows per source; more than a source has means that some come again within the epoch.

    Raises:
        UserError: Where nothing of `total` is left for the sources that have a weight.
    """
    fixed = [share.rows if share.rows is not None else count for share, count in zip(shares, available, strict=True)]
    weighted = [i for i, share in enumerate(shares) if share.weight is not None]
    if not weighted:
        return fixed
    others = sum(count for i, count in enumerate(fixed) if i not in weighted)
    pool = sum(available[i] for i in weighted) if total is None else total - others
    if pool <= 0:
        raise UserError(
            f"data.max_train_rows is {total}, and sources without a weight give {others} already; raise it, or give "
            "those sources fewer rows"
        )
    weights = [float(shares[i].weight or 0) for i in weighted]
    edges = [round(pool * sum(weights[: n + 1]) / sum(weights)) for n in range(len(weights))]
    counts = dict(zip(weighted, (high - low for low, high in zip([0, *edges], edges, strict=False)), strict=True))
    return [counts.get(i, count) for i, count in enumerate(fixed)]


def mixture(members: Sequence[Sequence[int]], counts: Sequence[int], seed: int) -> Callable[[int], list[int]]:
    """Which samples each epoch has.

    Every source is an endless row of shuffled passes; an epoch takes the next of it. So over the epochs no sample of a
    source comes more often than another by more than one, and rows that one epoch leaves out are in the next.

    Args:
        members: Sample indices of each source.
        counts: How many an epoch has of each.
        seed: Shuffles.

    Returns:
        From the epoch, from 0, its samples; their order says nothing, as training shuffles them.
    """

    def draw(epoch: int) -> list[int]:
        chosen: list[int] = []
        for source, (mine, count) in enumerate(zip(members, counts, strict=True)):
            chosen += _stretch(mine, epoch * count, count, f"{seed} {source}")
        return chosen

    return draw


def _stretch(mine: Sequence[int], start: int, count: int, seed: str) -> Iterable[int]:
    """`count` samples from the endless row of shuffled passes, from place `start`."""
    found: list[int] = []
    while len(found) < count and mine:
        passed, place = divmod(start + len(found), len(mine))
        order = list(mine)
        random.Random(f"{seed} {passed}").shuffle(order)
        found += order[place : place + count - len(found)]
    return found
