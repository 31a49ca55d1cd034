"""Image names as rows have them, matched to the files of a folder: by file name, where only one file fits."""

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
"""What a name without suffix may be called in full."""


class NameIndex:
    """The files under a folder by what their names have in common with a row's.

    Spaces around a name, capitals, accents' forms, `%20` and backslashes do not count; a suffix may be missing; a
    folder in front may be another. The folder is read when the first name is looked up.

    Args:
        root: The folder.
        follow_links: Whether links to folders are followed.
    """

    def __init__(self, root: Path, follow_links: bool = False) -> None:
        self.root = root
        self.follow_links = follow_links

    def candidates(self, name: str) -> list[str]:
        """Files that a name may mean, relative to the folder; several where it cannot be decided.

        Among files of one name those count whose folders agree best: the same ones, else those of the longer path
        continue the shorter one, else as many as possible from the end.
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
        """Files by their names, and by their names without suffix."""
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
    """All files under a folder; with links followed, every folder once, so that a circle of links ends.

    Args:
        root: The folder.
        follow_links: Whether links to folders are followed.
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
    """A name's folders and file in the form in which names are compared, without a drive and without `..`."""
    plain = re.sub(r"^\s*[A-Za-z]:(?=[\\/])", "", name).replace("\\", "/")
    parts = (_alike(part) for part in plain.split("/"))
    return tuple(part for part in parts if part not in ("", ".", ".."))


def contradictions(files: Mapping[str, str], matched: Mapping[str, str]) -> dict[str, str]:
    """Names that were matched to a file which another name, with other folders in front, also means.

    Args:
        files: The file of each name.
        matched: Of these names, those that were matched by file name.

    Returns:
        By matched name, the other name.
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
    """Whether the folders of two names agree as far as both have any."""
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
    """What file names of one image have in common, whatever their capitals, accents' forms and spaces around them."""
    return unicodedata.normalize("NFC", name).casefold().strip()


def _suffix(name: str) -> str:
    suffix = os.path.splitext(name)[1]
    return suffix if suffix in SUFFIXES else ""


COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)20\d\d_)?(\d{12}\.jpg)")
"""A file of COCO; the group is its name in the releases from 2017 on."""
_COCO_FOLDERS = ("", "train2017", "val2017", "train2014", "val2014")


def coco_names(name: str) -> list[str]:
    """Other names that COCO's releases give an image: 2014's files are `COCO_train2014_000000442786.jpg`, 2017's
    `000000442786.jpg`, each in a folder of the split.

    Args:
        name: As a row has it.

    Returns:
        Candidates beside it and in the splits' folders; none where the name is not COCO's.
    """
    folder, _, own = name.rpartition("/")
    match = COCO_NAME.fullmatch(own)
    if match is None:
        return []
    number = match[1]
    parent, _, last = folder.rpartition("/")
    bases = [folder, parent] if last in _COCO_FOLDERS[1:] else [folder]  # a folder of COCO's may be named, or not
    files = [number, *(f"COCO_{split}2014_{number}" for split in ("train", "val"))]
    found = ["/".join(filter(None, (base, sub, file))) for base in bases for sub in _COCO_FOLDERS for file in files]
    return [candidate for candidate in found if candidate != name]
