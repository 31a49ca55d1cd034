"""What all kinds of folder share: their base class, what a person may choose, and the rows they are converted to."""

from __future__ import annotations

import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from lora_llava.core.errors import UserError
from lora_llava.data.files.row_files import placed_rows
from lora_llava.data.files.shards import SPLIT_WORDS
from lora_llava.data.formats import IMAGE_SUFFIXES, Format
from lora_llava.data.formats.shared import alternatives
from lora_llava.data.images.image_names import walk_files
from lora_llava.data.images.image_sources import BadImageError, FolderImages

ROWS_FOLDER = "recipe_rows"
"""Subfolder to which `init` writes the rows of folders that are not tables."""
SPLITS = ("train", "validation", "test")
ASKED = ("presence", "count", "place", "captions")
"""What is asked about labelled boxes: whether, how many and where; or the captions of the same images."""
_NAMED = 3
_MOST_LISTED = 20
_IGNORED = ("__macosx", "thumbs.db", "desktop.ini", ROWS_FOLDER)
_NO_ROWS = re.compile(r"(readme|licen[cs]e|requirements)(\.\w+)*|recipe\.(ya?ml|json).*", re.IGNORECASE)


class Asker(Protocol):
    """Asks the person at a terminal; elsewhere it returns the default."""

    def choose(self, question: str, choices: Sequence[str], default: str | None) -> str | None:
        """Return one of the choices; the default if nobody can be asked."""
        ...

    def text(self, question: str, default: str) -> str:
        """Return a text; the default if nobody can be asked."""
        ...


class SilentAsker:
    """Asks nobody and returns the defaults."""

    def choose(self, question: str, choices: Sequence[str], default: str | None) -> str | None:
        return default

    def text(self, question: str, default: str) -> str:
        return default


@dataclass(frozen=True)
class FolderOptions:
    """What a person may choose about a folder.

    Attributes:
        columns: Column names of a table by role: image, question, answer, caption, label, id.
        sheet: The sheet of a workbook; None for the only one, or the one that has rows.
        question: The question asked about images that only have a label; None for a default that names the labels.
        label_is: Whether a table's label is a `class` or a `caption`; None decides by the labels.
        ask: Which of `ASKED` to ask about boxes; empty for the default.
        follow_links: Whether links in the folder may lead out of it.
        class_folders: Whether the folder of an image is its class, even if there is a table.
        asker: Asks what is not given.
        used: Names of the options above that had an effect, added where they are read.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    sheet: str | None = None
    question: str | None = None
    label_is: str | None = None
    ask: tuple[str, ...] = ()
    follow_links: bool = False
    class_folders: bool = False
    asker: Asker = field(default_factory=SilentAsker)
    used: set[str] = field(default_factory=set, compare=False)

    def without_effect(self) -> list[str]:
        """Return the flags that were given and had no effect on the folder."""
        names = ("columns", "sheet", "question", "label_is", "ask")
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) and name not in self.used]


class LeftOut:
    """What is left out, counted by reason, with a few names for each."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self.counts: dict[str, int] = {}
        self._more: set[str] = set()

    def add(self, reason: str, name: object = "", count: int = 1) -> None:
        """Count something that is left out; `reason` continues "3 ", such as "images without a label"."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        names = self.names.setdefault(reason, [])
        if str(name) and str(name) not in names:
            if len(names) < _NAMED:
                names.append(str(name))
            else:
                self._more.add(reason)

    def lines(self) -> list[str]:
        """Return one line for each reason: count, reason and examples."""
        return [
            f"{count:,} {_one(reason) if count == 1 else reason}{self._examples(reason)}"
            for reason, count in self.counts.items()
        ]

    def _examples(self, reason: str) -> str:
        names = self.names[reason]
        return f": {', '.join(names)}{', ...' if reason in self._more else ''}" if names else ""


def _one(reason: str) -> str:
    """Return a reason in the singular: its first word, and the verbs after it."""
    noun, _, rest = reason.partition(" ")
    noun = {"boxes": "box", "entries": "entry"}.get(noun, noun.removesuffix("s"))
    return (
        f"{noun} {rest}".replace(" are ", " is ")
        .replace(" were ", " was ")
        .replace(" lead ", " leads ")
        .replace(" fit ", " fits ")
    )


@dataclass(frozen=True)
class Packed:
    """A file in an archive that is unpacked when the rows are written.

    Attributes:
        archive: The archive.
        member: The file's name in it.
        target: Where it goes, relative to the folder of unpacked images.
        size: Its size in bytes.
    """

    archive: Path
    member: str
    target: str
    size: int


@dataclass
class ConvertedFolder:
    """The rows that a folder was converted to.

    Attributes:
        shape: A description for a person.
        splits: The rows of each split: `{"id", "image", ...}`, with image paths relative to the folder.
        facts: What else was understood, as pairs of name and text.
        left_out: What is not used.
        form: The value of `data.format` that reads the rows.
        is_table: Whether the rows are a table's, whose columns and image names are still to be understood.
        packed: Images to unpack.
        counts_images: Whether images without a label are counted in `left_out` already.
    """

    shape: str
    splits: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    facts: list[tuple[str, str]] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    form: Format = "conversations"
    is_table: bool = False
    packed: list[Packed] = field(default_factory=list)
    counts_images: bool = False

    def add(self, split: str, *rows: dict[str, Any]) -> None:
        """Append rows to a split."""
        self.splits.setdefault(split, []).extend(rows)


class FolderKind(ABC):
    """A kind of folder that `init` converts to rows. A module of this package defines one and an instance of it.

    Attributes:
        summary: A description for messages, such as "COCO annotations".
    """

    summary: ClassVar[str]

    @abstractmethod
    def find(self, folder: Path, files: Sequence[Path]) -> list[Path]:
        """Return those of the folder's files that are rows of this kind; none for another kind."""

    @abstractmethod
    def convert(self, folder: Path, files: Sequence[Path], options: FolderOptions) -> ConvertedFolder:
        """Convert the folder to rows.

        Args:
            folder: The folder.
            files: From `find`, or the one file that a person named.
            options: What the person chose.

        Raises:
            UserError: If the files cannot be used; the message names the next step.
        """


def object_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a file with their places, `rows.csv line 2`.

    Raises:
        UserError: For a row that is not an object with named fields.
    """
    for place, row in placed_rows(file):
        if not isinstance(row, Mapping):
            raise UserError(
                f"{file}, {place}: the row is {type(row).__name__}; it should be an object with named fields; correct "
                "or remove it"
            )
        yield f"{file.name} {place}", row


def plain_files(folder: Path) -> list[Path]:
    """Return the files that may hold rows or labels: not images, not hidden, not written by `init`, sorted by name."""
    found = []
    for where, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not _is_ignored(name))
        found += [
            Path(where, name)
            for name in names
            if not _is_ignored(name)
            and not name.lower().endswith(IMAGE_SUFFIXES)
            and not (Path(where) == folder and _NO_ROWS.fullmatch(name))
        ]
    return sorted(file for file in found if file.is_file())  # not pipes, which may block


def image_files(folder: Path, follow_links: bool = False) -> Iterator[Path]:
    """Yield the images under a folder, without hidden ones and those that `init` unpacked."""
    for file in map(Path, walk_files(folder, follow_links)):
        if file.suffix.lower() in IMAGE_SUFFIXES and not any(map(_is_ignored, file.relative_to(folder).parts)):
            yield file


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in _IGNORED


def split_named(name: str) -> str | None:
    """Return the split that a folder's name means, such as `validation` for `valid` and `val2017`; None for none."""
    plain = name.casefold().strip("0123456789 _-.")
    return next((split for split, words in SPLIT_WORDS.items() if plain in words), None)


def split_of(file: Path, folder: Path) -> str:
    """Return the split that a file belongs to, by the words of its name or by a folder above it; train by default."""
    relative = file.relative_to(folder) if file.is_relative_to(folder) else Path(file.name)
    words = (split_named(word) for word in re.split(r"[\W_]+", relative.stem))
    above = (split_named(part) for part in reversed(relative.parent.parts))
    return next(filter(None, (*words, *above)), "train")


class ImageFinder:
    """Finds the images of labels in a folder; names that no image has are counted as left out.

    Args:
        folder: The folder.
        follow_links: Whether links in it may lead out of it.
        left_out: Counts what is not found.
    """

    def __init__(self, folder: Path, follow_links: bool, left_out: LeftOut) -> None:
        self.root = folder.resolve()
        self.left_out = left_out
        self._images = FolderImages(folder, 1, follow_links=follow_links)

    def find(self, name: object, beside: str = "", what: str = "labels") -> str | None:
        """Return an image's path relative to the folder.

        Args:
            name: The name as the label file has it.
            beside: Folder of the label file relative to the root, which is tried first.
            what: What is left out if no image is found, for the count.
        """
        if not isinstance(name, str) or not name.strip():
            self.left_out.add(f"{what} without an image's name", name)
            return None
        tries = (
            [f"{beside}/{name}"] if beside not in ("", ".") and not os.path.isabs(name) and "://" not in name else []
        )
        for each in (*tries, name):
            try:
                path = self._images.find(each)
                if path.is_file():
                    return self._relative(path, each)
            except (BadImageError, OSError) as error:
                if getattr(error, "kind", "") in ("outside the folder", "ambiguous name"):
                    self.left_out.add(_REASONS[str(getattr(error, "kind", ""))].format(what), name)
                    return None
        self.left_out.add(f"{what} whose image is not in the folder", name)
        return None

    def exists(self, name: str) -> bool:
        """Check whether a name fits one image, without counting it."""
        try:
            return self._images.find(name).is_file()
        except (BadImageError, OSError):
            return False

    def _relative(self, path: Path, name: str) -> str:
        if path.is_relative_to(self.root):
            return path.relative_to(self.root).as_posix()
        return name  # a link that may be followed


_REASONS = {
    "outside the folder": "{} whose image is a URL or outside the folder",
    "ambiguous name": "{} whose image name fits several files",
}


def class_text(name: str) -> str:
    """Return a class name as text: underscores become spaces, accents have one form."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())


def class_question(classes: Iterable[str]) -> str:
    """Return the question about an image that has one of these classes."""
    names = sorted(set(classes), key=str.casefold)
    if len(names) > _MOST_LISTED:
        return "Which class does the image show? Answer with the name of the class."
    return f"Which of these is in the image: {alternatives(names)}? Answer with one of them."


def ask_question(options: FolderOptions, default: str) -> str:
    """Return the question of images that have only a label: the person's, or the default."""
    options.used.add("question")
    return (options.question or options.asker.text("Question asked of each image", default)).strip() or default


def counted(counts: Mapping[str, int]) -> str:
    """Return counts by name as text, the most frequent first: "ok 12, scratch 8"."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(ordered) - _MOST_LISTED:,} more" if len(ordered) > _MOST_LISTED else ""
    return ", ".join(f"{name} {count:,}" for name, count in ordered[:_MOST_LISTED]) + more


def is_only_class(classes: Iterable[str], what: str, left_out: LeftOut) -> bool:
    """Check whether labels are all the same, from which nothing can be learned; if so, count them as left out.

    Args:
        classes: The labels of all images.
        what: What they are, for the count, such as "tags".
        left_out: Counts them.
    """
    names = list(classes)
    if len(set(names)) != 1:
        return False
    left_out.add(f"{what} with the only value {names[0]}, from which nothing can be learned", count=len(names))
    return True


def number_of(count: int, noun: str) -> str:
    """Return a count with its noun: "1 row", "2 rows"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def refuse_one_class(classes: Iterable[str], where: object) -> None:
    """Refuse labels that are all the same, from which nothing can be learned.

    Raises:
        UserError: If there is only one class.
    """
    names = sorted(set(classes))
    if len(names) == 1:
        raise UserError(
            f"{where}: every image is labelled {names[0]}; a model would only learn to say that; add images of a "
            "second class, in a folder or with a label of its own"
        )
