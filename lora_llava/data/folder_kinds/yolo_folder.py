"""YOLO's folders: `labels/*.txt` beside `images/`, with class names in `data.yaml` or `classes.txt`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lora_llava.core.errors import UserError
from lora_llava.data.folder_kinds.box_questions import BoxedImage, ObjectBox, add_box_questions
from lora_llava.data.folder_kinds.folder_kind import (
    ConvertedFolder,
    FolderKind,
    FolderOptions,
    class_text,
    image_files,
    split_of,
)

_CLASSES = ("classes.txt", "obj.names", "_darknet.labels")
_LARGEST = 1 << 20


class YoloFolder(FolderKind):
    """A text file with `class x y width height` lines for each image."""

    summary = "YOLO labels"

    def find(self, folder: Path, files: Sequence[Path]) -> list[Path]:
        texts = [file for file in files if file.suffix.lower() == ".txt" and file.is_relative_to(folder)]
        return [file for file in texts if "labels" in file.relative_to(folder).parts and file.name not in _CLASSES]

    def convert(self, folder: Path, files: Sequence[Path], options: FolderOptions) -> ConvertedFolder:
        names = _names(folder)
        if not names:
            raise UserError(
                f"{folder}: its labels name classes by number only; add classes.txt with one name a line, or data.yaml"
            )
        found = ConvertedFolder(self.summary, counts_images=True)
        images: dict[str, list[Path]] = {}
        for image in image_files(folder, options.follow_links):
            images.setdefault(_key(image, folder), []).append(image)
        boxed = []
        for file in files:
            fitting = images.get(_key(file, folder), [])
            if len(fitting) > 1:
                fitting = [each for each in fitting if _beside(each, folder) == _beside(file, folder)] or fitting
            relative = file.relative_to(folder).as_posix()
            if not fitting:
                found.left_out.add("label files whose image is not in the folder", relative)
                continue
            if len(fitting) > 1:
                shown = ", ".join(each.relative_to(folder).as_posix() for each in fitting[:3])
                images[_key(file, folder)] = [each for each in images[_key(file, folder)] if each not in fitting]
                found.left_out.add("files of labels that fit several images", f"{relative}: {shown}")
                continue
            image = fitting[0]
            images[_key(file, folder)].remove(image)
            boxes = _boxes(file, relative, names, found)
            if boxes is None:
                continue
            split = split_of(image.parent / "x", folder)
            boxed.append(BoxedImage(relative, image.relative_to(folder).as_posix(), split, tuple(boxes)))
        for image in (image for left in images.values() for image in left):
            found.left_out.add("images without a label file", image.relative_to(folder).as_posix())
        if not any(each.boxes for each in boxed):
            raise UserError(f"{folder}: no label file has a line such as `0 0.5 0.5 0.2 0.2`; export the labels again")
        add_box_questions(found, boxed, options)
        return found


def _key(file: Path, folder: Path) -> str:
    """Return the path without suffix, and without the folder that is `images` for one and `labels` for the other."""
    parts = [part for part in file.relative_to(folder).parts[:-1] if part.lower() not in ("images", "labels")]
    return "/".join([*parts, file.stem])


def _beside(file: Path, folder: Path) -> tuple[str, ...]:
    """Return the folders of a file, in which `images` and `labels` are the same."""
    return tuple("" if part.lower() in ("images", "labels") else part for part in file.relative_to(folder).parts[:-1])


def _names(folder: Path) -> list[str] | dict[int, str]:
    for name in _CLASSES:
        for file in (folder / name, folder / "labels" / name):
            if file.is_file() and file.stat().st_size < _LARGEST:
                lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
                return [class_text(line) for line in "\n".join(lines).rstrip().splitlines()]  # a number is a line
    for file in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        content = _yaml(file)
        listed = content.get("names") if isinstance(content, Mapping) else None
        if isinstance(listed, list):
            return [class_text(str(each)) for each in listed]
        if isinstance(listed, Mapping):
            return {int(key): class_text(str(each)) for key, each in listed.items() if str(key).isdecimal()}
    return []


def _yaml(file: Path) -> object:
    if file.stat().st_size > _LARGEST:
        return None
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    if "*" in text or "&" in text:  # aliases could expand without end
        return None
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError):
        return None


def _boxes(
    file: Path, relative: str, names: list[str] | dict[int, str], found: ConvertedFolder
) -> list[ObjectBox] | None:
    """Read the lines `class x y width height`, or `class x1 y1 x2 y2 x3 y3 ...` of outlines.

    Returns:
        The boxes; None if a line is not understood, since what the image lacks is then unknown.
    """
    boxes = []
    text = file.read_text(encoding="utf-8-sig", errors="replace") if file.stat().st_size < _LARGEST else "too large"
    known = names if isinstance(names, dict) else dict(enumerate(names))
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            label, *values = (float(each) for each in line.split())
            if len(values) < 4 or label != int(label) or not all(map(math.isfinite, values)):
                raise ValueError
        except (ValueError, OverflowError):
            found.left_out.add("images with a line that is not class, x, y, width, height", f"{relative} line {number}")
            return None
        if int(label) not in known:
            found.left_out.add(
                "images with a box of a class without a name", f"{relative} line {number}: class {int(label)}"
            )
            return None
        x, y = values[:2]
        if len(values) >= 6:
            x, y = (sum(values[at::2]) / len(values[at::2]) for at in (0, 1))
        boxes.append(ObjectBox(known[int(label)], x, y))
    return boxes
