"""Data sets in several files (shards), such as `train-00000-of-00003.parquet`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lora_llava.core.errors import UserError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
"""Names of splits in file names."""
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json")
"""Metadata files that `datasets` writes beside the rows."""
_NAME = re.compile(r"(?P<stem>.*?)(?P<index>\d+)(?P<of>[-_.]of[-_.])(?P<total>\d+)(?P<hash>-[0-9a-f]{6,})?")
"""Shard names of `datasets` and TensorFlow; older releases of `datasets` add a hash of the content."""
_NAMED = 5
_DIGITS_FROM_ZERO = 4
"""Numbers with at least this many digits are counted from zero (`00000-of-00003`), others from one (`1-of-3`), unless
the files show it."""


@dataclass(frozen=True)
class Shard:
    """The parts of a shard's name.

    Attributes:
        stem: The text before the numbers, such as `train-`.
        index: The shard's number.
        total: The number of shards.
        digits: The number of digits of the index.
        rest: The text between the index and the hash, such as `-of-00003`.
        hash: The hash of the content, or empty.
        suffix: The file's suffix.
    """

    stem: str
    index: int
    total: int
    digits: int
    rest: str
    hash: str
    suffix: str

    def name(self, index: int) -> str:
        """Return the file name of the shard with this number; `*` stands for an unknown hash."""
        return f"{self.stem}{index:0{self.digits}d}{self.rest}{'-*' if self.hash else ''}{self.suffix}"


def shard_of(name: str) -> Shard | None:
    """Parse the name of a shard; None if the file is not a shard."""
    path = Path(name)
    found = _NAME.fullmatch(path.stem)
    if found is None or int(found["total"]) < 1:
        return None
    return Shard(
        found["stem"],
        int(found["index"]),
        int(found["total"]),
        len(found["index"]),
        f"{found['of']}{found['total']}",
        found["hash"] or "",
        path.suffix,
    )


def set_stem(file: Path) -> str:
    """Return the name of a file's data set: the file's name without suffix and shard number."""
    shard = shard_of(file.name)
    return file.stem if shard is None else shard.stem.rstrip("-_.") or file.parent.name


def group_files(files: Iterable[Path]) -> list[tuple[Path, ...]]:
    """Group shards into sets; a file that is not a shard is a set by itself.

    Args:
        files: Files of rows, in one or several folders.

    Returns:
        Sets in the order of their first files, with shards by number; a set may be incomplete.
    """
    sets: dict[tuple[object, ...], list[tuple[int, Path]]] = {}
    for file in files:
        shard = shard_of(file.name)
        key = (file,) if shard is None else (file.parent, shard.stem, shard.rest, bool(shard.hash), shard.suffix)
        sets.setdefault(key, []).append((shard.index if shard else 0, file))
    return [tuple(file for _, file in sorted(found)) for found in sets.values()]


def all_shards(file: Path, where: str) -> tuple[Path, ...]:
    """Return all files of the set that a file belongs to.

    Args:
        file: A shard, or another file.
        where: The recipe field of the file, for messages.

    Returns:
        The files in order; only the file if it is not a shard.

    Raises:
        UserError: If shards are missing or repeated; the message names them.
    """
    shard = shard_of(file.name)
    if shard is None:
        return (file,)
    beside = {each for each in file.parent.iterdir() if each.is_file() and not each.name.startswith(".")}
    named = next(found for found in group_files({*beside, file}) if file in found)
    files = tuple(each for each in named if each in beside)
    indices = [found.index for each in files if (found := shard_of(each.name))]
    twice = next((index for index in indices if indices.count(index) > 1), None)
    if twice is not None:
        both = " and ".join(each.name for each in files if (s := shard_of(each.name)) and s.index == twice)
        raise UserError(f"{where}: {both} in {file.parent} are the same shard; keep one")
    first = 1 if 0 not in indices and (shard.total in indices or shard.digits < _DIGITS_FROM_ZERO) else 0
    numbers = range(first, first + shard.total)
    count = shard.total - len([index for index in indices if index in numbers])
    if count:
        missing = islice((shard.name(index) for index in numbers if index not in indices), _NAMED)
        more = f" and {count - _NAMED:,} more" if count > _NAMED else ""
        raise UserError(
            f"{where}: {file.parent} lacks {', '.join(missing)}{more}, of the {shard.total:,} shards of "
            f"{set_stem(file)}; add the missing files"
        )
    over = next((each.name for each in files if (s := shard_of(each.name)) and s.index not in numbers), None)
    if over is not None:
        raise UserError(f"{where}: {over} in {file.parent} has a number over its total; rename it")
    return files


def row_files(folder: Path, deeper: bool = False) -> list[Path]:
    """Return a folder's files of rows, or those of its subfolders, sorted by name."""
    return sorted(
        file
        for file in folder.glob("*/*" if deeper else "*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not file.name.startswith(".")
        and file.name not in _NOT_ROWS
    )


def set_words(file: Path, folder: Path) -> set[str]:
    """Return the words of a file's name, or of its folder's name if the file's is only a number."""
    name = set_stem(file)
    if re.fullmatch(r"[\d_.-]*", name) and file.parent != folder:
        name = file.parent.name
    return set(re.split(r"[\W_]+", name.lower()))


def split_words(split: str) -> set[str]:
    """Return the names of a split in file names."""
    return next((set(words) for words in SPLIT_WORDS.values() if split.lower() in words), {split.lower()})
