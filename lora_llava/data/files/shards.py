"""Data sets in several files: `train-00000-of-00003.parquet` and its siblings are one."""

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
    "test": ("test",),
}
"""What people call their splits in file names."""
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json")
"""What `datasets` writes beside the rows."""
_NAME = re.compile(r"(?P<stem>.*?)(?P<index>\d+)(?P<of>[-_.]of[-_.])(?P<total>\d+)(?P<hash>-[0-9a-f]{6,})?")
"""As `datasets` and TensorFlow name them; older releases of `datasets` add a hash of the content."""
_NAMED = 5
_DIGITS_FROM_ZERO = 4
"""`1-of-3` counts from one, `00000-of-00003` from zero, where the set itself does not say."""


@dataclass(frozen=True)
class Shard:
    """What a shard's name says.

    Attributes:
        stem: What stands before the numbers, such as `train-`.
        index: Its number.
        total: How many there are.
        digits: How many digits its number has.
        rest: What stands between the number and the hash, such as `-of-00003`.
        hash: The hash of its content, or nothing.
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
        """The file name of the set's shard with this number; `*` stands for an unknown hash."""
        return f"{self.stem}{index:0{self.digits}d}{self.rest}{'-*' if self.hash else ''}{self.suffix}"


def shard_of(name: str) -> Shard | None:
    """What a file's name says of its place in a set; None where it is a file by itself."""
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
    """A file's name without its suffix and a shard's number: what its data set is called."""
    shard = shard_of(file.name)
    return file.stem if shard is None else shard.stem.rstrip("-_.") or file.parent.name


def group_files(files: Iterable[Path]) -> list[tuple[Path, ...]]:
    """Bring the shards of a set together; a file that is no shard is a set by itself.

    Args:
        files: Files of rows, of one folder or several.

    Returns:
        Sets in the order of their first files, shards by number; a set may lack shards.
    """
    sets: dict[tuple[object, ...], list[tuple[int, Path]]] = {}
    for file in files:
        shard = shard_of(file.name)
        key = (file,) if shard is None else (file.parent, shard.stem, shard.rest, bool(shard.hash), shard.suffix)
        sets.setdefault(key, []).append((shard.index if shard else 0, file))
    return [tuple(file for _, file in sorted(found)) for found in sets.values()]


def whole_set(file: Path, where: str) -> tuple[Path, ...]:
    """All files of the set that a file is part of.

    Args:
        file: A shard, or a file by itself.
        where: The field that names it, for messages.

    Returns:
        The files in order; the file alone where it is no shard.

    Raises:
        UserError: Naming the shards that are missing, or that are there twice.
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
            f"{set_stem(file)}; add what is missing"
        )
    over = next((each.name for each in files if (s := shard_of(each.name)) and s.index not in numbers), None)
    if over is not None:
        raise UserError(f"{where}: {over} in {file.parent} is numbered over its total; rename it")
    return files


def row_files(folder: Path, deeper: bool = False) -> list[Path]:
    """A folder's files of rows, or those of its subfolders, in the order of their names."""
    return sorted(
        file
        for file in folder.glob("*/*" if deeper else "*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not file.name.startswith(".")
        and file.name not in _NOT_ROWS
    )


def set_words(file: Path, folder: Path) -> set[str]:
    """The words of a file's name, or, where that is only a number, of the folder's that it is in."""
    name = set_stem(file)
    if re.fullmatch(r"[\d_.-]*", name) and file.parent != folder:
        name = file.parent.name
    return set(re.split(r"[\W_]+", name.lower()))


def split_words(split: str) -> set[str]:
    """What people call a split in file names."""
    return next((set(words) for words in SPLIT_WORDS.values() if split.lower() in words), {split.lower()})
