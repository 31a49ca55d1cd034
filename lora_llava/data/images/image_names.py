"""Match the image names of rows to the files of a folder, by file name if only one file fits."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

MATCHED = "image matched by file name"
"""Kind of note."""
SUFFIXES = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".webp",
        ".bmp",
        ".dib",
        ".gif",
        ".tif",
        ".tiff",
        ".avif",
        ".jp2",
        ".j2k",
        ".tga",
        ".ppm",
        ".pgm",
        ".ico",
        ".mpo",
    )
)
"""Suffixes that a name without one may have."""


class NameIndex:
    """An index of the files under a folder, for inexact names.

    Surrounding spaces, capitals, the form of accents, `%20` and backslashes are ignored; a suffix may be missing, and
    the folders may differ. The folder is read when the first name is looked up.

    Args:
        root: The folder.
        follow_links: Whether to follow links to folders.
    """

    def __init__(self, root: Path, follow_links: bool = False) -> None:
        self.root = root
        self.follow_links = follow_links

    def candidates(self, name: str) -> list[str]:
        """Return the files that a name may mean, relative to the folder; several if the name is ambiguous.

        Among files of one name, those with the best-matching folders are returned: equal folders first, then folders of
        which one path ends with the other, then the most equal folders counted from the end.
        """
        for text in dict.fromkeys((name, unquote(name))):
            parts = name_parts(text)
            if not parts:
                continue
            exact, stems = self._files
            found = exact.get(parts[-1]) or ([] if _suffix(parts[-1]) else stems.get(parts[-1], []))
            if found:
                ranks = {file: _agreement(parts, text, file) for file in found}
                return sorted(file for file, rank in ranks.items() if rank == max(ranks.values()))
        return []

    @cached_property
    def _files(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """The files by name, and by name without suffix."""
        exact: dict[str, list[str]] = {}
        stems: dict[str, list[str]] = {}
        for file in walk_files(self.root, self.follow_links):
            own = _alike(os.path.basename(file))
            relative = os.path.relpath(file, self.root).replace(os.sep, "/")
            exact.setdefault(own, []).append(relative)
            if suffix := _suffix(own):
                stems.setdefault(own.removesuffix(suffix), []).append(relative)
        return exact, stems


def walk_files(root: Path, follow_links: bool = False) -> Iterator[str]:
    """Yield all files under a folder; if links are followed, each folder once, so that cycles of links end.

    Args:
        root: The folder.
        follow_links: Whether to follow links to folders.
    """
    seen: set[str] = set()
    for folder, below, files in os.walk(root, followlinks=follow_links):
        if follow_links:
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()
                continue
            seen.add(real)
        yield from (os.path.join(folder, name) for name in files)


def name_parts(name: str) -> tuple[str, ...]:
    """Return a name's folders and file, normalised for comparison, without a drive and without `..`."""
    plain = re.sub(r"^\s*[A-Za-z]:(?=[\\/])", "", name).replace("\\", "/")
    parts = (_alike(part) for part in plain.split("/"))
    return tuple(part for part in parts if part not in ("", ".", ".."))


def contradictions(files: Mapping[str, str], matched: Mapping[str, str]) -> dict[str, str]:
    """Find names matched to a file that another name, with different folders, also means.

    Args:
        files: The file of each name.
        matched: The names that were matched by file name.

    Returns:
        The other name, by matched name.
    """
    of_file: dict[str, dict[tuple[str, ...], str]] = {}
    for name, file in files.items():
        of_file.setdefault(file, {}).setdefault(name_parts(name), name)
    found = {}
    for name in matched:
        own = name_parts(name)
        others = of_file[files[name]]
        other = next((each for parts, each in others.items() if not _continues(own, parts)), None)
        if other is not None:
            found[name] = other
    return found


def _continues(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Check whether the folders of two names agree as far as both have folders."""
    shorter = min(len(one), len(other)) - 1
    return shorter == 0 or one[:-1][-shorter:] == other[:-1][-shorter:]


def _agreement(parts: tuple[str, ...], name: str, file: str) -> tuple[bool, bool, int, bool]:
    theirs = name_parts(file)
    folders, own = parts[:-1], theirs[:-1]
    same = 0
    while same < min(len(folders), len(own)) and folders[-1 - same] == own[-1 - same]:
        same += 1
    as_written = name.replace("\\", "/").rpartition("/")[2].strip() == file.rpartition("/")[2].strip()
    return folders == own, _continues(parts, theirs), same, as_written


def _alike(name: str) -> str:
    """Normalise a file name: capitals, the form of accents and surrounding spaces."""
    return unicodedata.normalize("NFC", name).casefold().strip()


def _suffix(name: str) -> str:
    suffix = os.path.splitext(name)[1]
    return suffix if suffix in SUFFIXES else ""


COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)20\d\d_)?(\d{12}\.jpg)")
"""File names of COCO; the group is the name in the releases from 2017 on."""
_COCO_FOLDERS = ("", "train2017", "val2017", "train2014", "val2014")


def coco_names(name: str) -> list[str]:
    """Return the other names of an image in COCO's releases: 2014's files are `COCO_train2014_000000442786.jpg`, 2017's
    `000000442786.jpg`, each in a folder of the split.

    Args:
        name: The image name of a row.

    Returns:
        Candidates beside it and in the splits' folders; none if the name is not from COCO.
    """
    folder, _, own = name.rpartition("/")
    match = COCO_NAME.fullmatch(own)
    if match is None:
        return []
    number = match[1]
    parent, _, last = folder.rpartition("/")
    bases = [folder, parent] if last in _COCO_FOLDERS[1:] else [folder]  # the name may or may not have a COCO folder
    files = [number, *(f"COCO_{split}2014_{number}" for split in ("train", "val"))]
    found = ["/".join(filter(None, (base, sub, file))) for base in bases for sub in _COCO_FOLDERS for file in files]
    return [candidate for candidate in found if candidate != name]
