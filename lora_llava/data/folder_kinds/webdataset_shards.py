"""WebDataset: tar shards in which the files of a sample share a name: `1.jpg`, `1.txt`, `1.json`, `1.cls`."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.data.folder_kinds.folder_kind import (
    ConvertedFolder,
    FolderKind,
    FolderOptions,
    Packed,
    ask_question,
    class_question,
    class_text,
    counted,
    number_of,
    refuse_one_class,
    split_of,
)
from lora_llava.data.formats import IMAGE_SUFFIXES

_TAR = re.compile(r".*\.tar(\.gz|\.bz2|\.xz)?|.*\.tgz", re.IGNORECASE)
_TEXTS = ("txt", "text", "caption", "json", "cls", "cls.txt")
_IMAGE_NAMES = (".image", ".img", ".rgb", ".input")
"""What may be between the name of a sample and the suffix of its image."""
_MOST_TEXT = 1 << 20
_MOST_IMAGE = 1 << 28
"""Most bytes of a text and of an image in a shard."""
_MOST_MEMBERS = 10_000_000
_CLASS_NAMES = ("classes.txt", "classnames.txt", "class_names.txt", "labels.txt")


@dataclass
class _Sample:
    """The files of a sample."""

    name: str
    archive: Path
    image: tarfile.TarInfo | None = None
    texts: dict[str, str] = field(default_factory=dict)


class WebDatasetShards(FolderKind):
    """Tar archives with an image and a text, JSON or class for each sample."""

    summary = "WebDataset shards"

    def find(self, folder: Path, files: Sequence[Path]) -> list[Path]:
        return [file for file in files if _TAR.fullmatch(file.name)]

    def convert(self, folder: Path, files: Sequence[Path], options: FolderOptions) -> ConvertedFolder:
        found = ConvertedFolder(self.summary)
        names = _class_names(folder)
        classes: list[tuple[str, str, str, str]] = []
        taken: dict[str, str] = {}
        captions = 0
        for archive in files:
            split = split_of(archive, folder)
            for sample in _samples(archive, found):
                row_id = f"{archive.name} {sample.name}"
                content = _content(sample, names)
                if sample.image is not None and content is None:
                    found.left_out.add("samples without a text, a caption or a class", row_id)
                    continue
                image = _unpacked(archive, sample, folder, found, taken)
                if image is None or content is None:
                    continue
                if isinstance(content, str):
                    classes.append((split, row_id, image, content))
                else:
                    captions += "caption" in content
                    found.add(split, {"id": row_id, "image": image} | content)
        _add_classes(found, classes, options, folder)
        if not found.splits.get("train"):
            raise UserError(
                f"{folder}: its shards have no training sample with an image and a text, such as 0001.jpg and "
                f"0001.txt; {'; '.join(found.left_out.lines()) or 'they are empty'}; write them with both"
            )
        all_rows = sum(map(len, found.splits.values()))
        found.form = "captions" if captions == all_rows else "conversations"
        if 0 < captions < all_rows:
            _ask_for_captions(found)
        size = sum(each.size for each in found.packed)
        found.facts.append(
            ("shards", f"{len(files):,}, with {number_of(len(found.packed), 'image')} to unpack ({size:,} bytes)")
        )
        return found


def _class_names(folder: Path) -> list[str]:
    file = next((folder / name for name in _CLASS_NAMES if (folder / name).is_file()), None)
    text = file.read_text(encoding="utf-8-sig", errors="replace") if file else ""
    return [class_text(line) for line in text.splitlines() if line.strip()]


def _samples(archive: Path, found: ConvertedFolder) -> Iterator[_Sample]:
    """Yield the samples of an archive in the order of their first file."""
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(archive) as tar:
            for count, member in enumerate(tar):
                if count >= _MOST_MEMBERS:
                    raise UserError(f"{archive}: it has more than {_MOST_MEMBERS:,} files; write smaller shards")
                _read_member(archive, tar, member, samples, found)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if not samples:
            reason = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
            raise UserError(f"{archive}: not a complete tar archive: {reason}; download or write it again") from None
        found.left_out.add("archives cut short, read up to the cut", archive.name)
        key, _ = samples.popitem()  # its last file may be cut
        found.left_out.add("samples at the cut of an archive", f"{archive.name} {key}")
    yield from samples.values()


def _read_member(
    archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, samples: dict[str, _Sample], found: ConvertedFolder
) -> None:
    parts = member.name.removeprefix("./").split("/")
    if member.isdir():
        return
    if not member.isfile() or ".." in parts or member.name.startswith("/") or "\\" in member.name:
        found.left_out.add("files in shards that are links or lead out of the archive", member.name)
        return
    if parts[-1].startswith((".", "__MACOSX")):
        return
    own, _, extension = parts[-1].partition(".")
    key = "/".join([*parts[:-1], own])
    extension = extension.lower()
    sample = samples.setdefault(key, _Sample(key, archive))
    if _is_image(extension):
        if sample.image is not None:
            found.left_out.add("images after the first of a sample", member.name)
        elif member.size > _MOST_IMAGE:
            found.left_out.add("images over 256 MB", member.name)
        else:
            sample.image = member
    elif extension in _TEXTS and member.size <= _MOST_TEXT:
        stream = tar.extractfile(member)
        assert stream is not None  # it is a file
        sample.texts[extension] = stream.read().decode("utf-8-sig", errors="replace").strip()
    else:
        found.left_out.add(f"files in shards of type .{extension}, which are not read", member.name)


def _is_image(extension: str) -> bool:
    """Whether a file is the sample's image; `1.depth.png` and `1.mask.png` are other images of the same sample."""
    *before, last = (f".{part}" for part in extension.split("."))
    return last in IMAGE_SUFFIXES and all(part in (*IMAGE_SUFFIXES, *_IMAGE_NAMES) for part in before)


def _unpacked(
    archive: Path, sample: _Sample, folder: Path, found: ConvertedFolder, taken: dict[str, str]
) -> str | None:
    """Return where a sample's image goes, and note it to be unpacked; `taken` has the places of other samples."""
    if sample.image is None:
        found.left_out.add("samples without an image", f"{archive.name} {sample.name}")
        return None
    shard = archive.relative_to(folder).as_posix() if archive.is_relative_to(folder) else archive.name
    stem = _TAR.sub(lambda match: re.sub(r"\.(tar.*|tgz)$", "", match[0], flags=re.IGNORECASE), shard)
    suffix = Path(sample.image.name).suffix.lower()
    source = f"{shard} {sample.name}{suffix}"
    target = re.sub(r"[^\w./ -]", "_", f"{stem}/{sample.name}{suffix}")
    if taken.setdefault(target.casefold(), source) != source:  # as a+1 and a_1, or A and a on Windows
        digest = hashlib.sha256(source.encode()).hexdigest()[:8]
        target = f"{target.removesuffix(suffix)}_{digest}{suffix}"
    found.packed.append(Packed(archive, sample.image.name, target, sample.image.size))
    return target


def _content(sample: _Sample, names: Sequence[str]) -> dict[str, Any] | str | None:
    """Return the columns of a sample's row, a class as text, or None if it has neither."""
    if "json" in sample.texts:
        try:
            content = json.loads(sample.texts["json"])
        except (ValueError, RecursionError):
            content = None
        row = _row_of(content) if isinstance(content, Mapping) else None
        if row is not None:
            return row
    text = next((sample.texts[key] for key in _TEXTS[:3] if sample.texts.get(key)), "")
    if text:
        return {"caption": " ".join(text.split())}
    label = next((sample.texts[key] for key in ("cls", "cls.txt") if sample.texts.get(key)), "")
    if label.isdecimal() and len(label) < 10:
        number = int(label)
        return names[number] if number < len(names) else f"class {number}"
    return class_text(label) or None


def _row_of(content: Mapping[str, Any]) -> dict[str, Any] | None:
    for key in ("conversations", "messages"):
        if isinstance(content.get(key), list):
            return {key: content[key]}
    question, answer = content.get("question"), content.get("answer")
    if isinstance(question, str) and isinstance(answer, str) and question.strip() and answer.strip():
        return {"question": question.strip(), "answer": answer.strip()}
    for key in ("caption", "text", "description"):
        if isinstance(content.get(key), str) and content[key].strip():
            return {"caption": " ".join(content[key].split())}
    return None


def _add_classes(
    found: ConvertedFolder, classes: Sequence[tuple[str, str, str, str]], options: FolderOptions, folder: Path
) -> None:
    if not classes:
        return
    refuse_one_class((label for split, _, _, label in classes if split == "train"), folder)
    question = ask_question(options, class_question(label for *_, label in classes))
    for split, row_id, image, label in classes:
        found.add(split, {"id": row_id, "image": image, "question": question, "answer": label})
    counts = Counter(label for *_, label in classes)
    found.facts.append(("classes", counted(counts)))
    found.facts.append(("question", question))
    if any(label.startswith("class ") for label in counts):
        found.facts.append(("class names", "unknown: write them into classes.txt, one a line, and run init again"))


def _ask_for_captions(found: ConvertedFolder) -> None:
    """Turn captions into answers, since the other rows are questions."""
    for rows in found.splits.values():
        for row in rows:
            if "caption" in row:
                row |= {"question": "Describe the image concisely.", "answer": row.pop("caption")}
