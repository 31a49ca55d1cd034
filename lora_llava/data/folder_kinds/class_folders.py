"""Class folders: `ok/`, `scratch/`, where the folder of an image is its label, with or without folders of splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_llava.core.errors import UserError
from lora_llava.data.folder_kinds.folder_kind import (
    ROWS_FOLDER,
    SPLITS,
    ConvertedFolder,
    FolderKind,
    FolderOptions,
    ImageFinder,
    LeftOut,
    ask_question,
    class_question,
    class_text,
    counted,
    image_files,
    number_of,
    refuse_one_class,
    split_named,
)


@dataclass(frozen=True)
class _Labelled:
    """An image with its class and split."""

    image: Path
    label: str
    split: str


class ClassFolders(FolderKind):
    """Images in folders named after their classes."""

    summary = "class folders"

    def find(self, folder: Path, files: Sequence[Path]) -> list[Path]:
        """Return the folder itself if images lie in folders below it that are not only splits or `images`."""
        labels = {each.label for each in _labelled(folder, image_files(folder))[0]}
        return [folder] if labels else []

    def convert(self, folder: Path, files: Sequence[Path], options: FolderOptions) -> ConvertedFolder:
        found = ConvertedFolder(self.summary, counts_images=True)
        finder = ImageFinder(folder, options.follow_links, LeftOut())
        files = list(image_files(folder, options.follow_links))
        there = [file for file in files if finder.exists(file.relative_to(folder).as_posix())]
        readable = set(there)
        for file in (file for file in files if file not in readable):
            found.left_out.add("links out of the folder, read with --follow-links", file.relative_to(folder).as_posix())
        labelled, loose = _labelled(folder, there)
        if not labelled:
            reasons = "; ".join(found.left_out.lines())
            raise UserError(
                f"{folder} has no images in class folders{': ' + reasons if reasons else ''}; sort the images into a "
                "folder for each class"
            )
        names, renamed = _one_spelling([each.label for each in labelled])
        train = {names[each.label] for each in labelled if each.split == "train"}
        if not train:
            raise UserError(
                f"{folder} has class folders only under {labelled[0].image.relative_to(folder).parts[0]}, which are "
                "held-out images; add a folder train with the classes to train on"
            )
        if len(train) == 1 and not any(each.split != "train" for each in labelled):
            raise UserError(
                f"{folder} has no table, and all its images are in one folder, {labelled[0].label}; sort them into a "
                "folder for each class, or add a CSV with the columns image, question, answer and a row per question"
            )
        refuse_one_class(train, folder)
        question = ask_question(options, class_question(names.values()))
        for each in labelled:
            image = each.image.relative_to(folder).as_posix()
            found.add(each.split, {"id": image, "image": image, "question": question, "answer": names[each.label]})
        for file in loose:
            found.left_out.add("images outside the class folders", file.relative_to(folder).as_posix())
        for unused in _empty_folders(folder, labelled, loose):
            found.left_out.add("folders without images", unused)
        _add_facts(found, question, renamed, names)
        _add_twins(found, folder, labelled, names)
        return found


def _labelled(folder: Path, images: Iterable[Path]) -> tuple[list[_Labelled], list[Path]]:
    """Return the images in class folders, and the others.

    Folders around all others (`data/images/ok`) and folders of splits, above or below the classes, are not classes.
    """
    files = sorted(images)
    depth = _wrapping_depth(folder, files)
    tops = {parts[depth] for file in files if len(parts := file.relative_to(folder).parts) > depth + 1}
    has_splits = any(split_named(top) == "train" for top in tops)
    found, loose = [], []
    for file in files:
        parts = file.relative_to(folder).parts[:-1]
        if has_splits and len(parts) > depth and split_named(parts[depth]) is None:  # masks beside train and test
            loose.append(file)
            continue
        split, label = "train", None
        above = next((named for part in parts[:depth] if (named := split_named(part))), None)
        for part in parts[depth:]:
            named = split_named(part)
            if named is not None and above is None:
                above = named
            elif label is None and part.casefold() not in ("images", "imgs"):
                label = part
        split = above or split
        if label is None:
            loose.append(file)
        else:
            found.append(_Labelled(file, label, split))
    return found, loose


def _wrapping_depth(folder: Path, files: Sequence[Path]) -> int:
    """Return how many levels of folders all images share, below which the classes are."""
    parents = [parts for file in files if (parts := file.relative_to(folder).parts[:-1])]
    depth = 0
    while parents and len({each[depth] for each in parents}) == 1:
        below = [each for each in parents if len(each) > depth + 1]
        if len(below) < len(parents) and len({each[depth + 1] for each in below}) < 2:
            break
        parents, depth = below, depth + 1
    return depth


def _one_spelling(labels: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the class of each folder name, and the names that differ from it by more than underscores.

    Names that differ only in capitals, accents' form, spaces, hyphens and underscores are one class, spelt as most of
    its images are.
    """
    groups: dict[str, Counter[str]] = {}
    for label in labels:
        groups.setdefault(class_text(label).casefold().replace("-", " "), Counter())[class_text(label)] += 1
    best = {key: max(counts, key=lambda name: (counts[name], name)) for key, counts in groups.items()}
    names = {label: best[class_text(label).casefold().replace("-", " ")] for label in labels}
    return names, sorted(label for label in names if class_text(label) != names[label])


def _empty_folders(folder: Path, labelled: Sequence[_Labelled], loose: Sequence[Path]) -> list[str]:
    used = {parent for each in labelled for parent in each.image.parents} | {p for file in loose for p in file.parents}
    folders = (path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folders
        if path not in used
        and path.name != ROWS_FOLDER
        and not any(part.startswith((".", "__")) for part in path.parts[-2:])
    )


def _add_facts(found: ConvertedFolder, question: str, renamed: Sequence[str], names: dict[str, str]) -> None:
    counts = {split: Counter(row["answer"] for row in rows) for split, rows in found.splits.items()}
    for split in SPLITS:
        if split in counts:
            found.facts.append((f"classes in {split}" if len(counts) > 1 else "classes", counted(counts[split])))
    changed = "; underscores became spaces" if any("_" in label for label in names) else ""
    found.facts.append(("answer", f"the name of the image's folder{changed}"))
    found.facts.append(("question", question))
    if renamed:
        found.facts.append(("one class", ", ".join(f"{name} is read as {names[name]}" for name in renamed)))
    for split in ("validation", "test"):
        unseen = sorted(counts.get(split, Counter()).keys() - counts["train"].keys())
        if unseen:
            found.facts.append(("not in train", f"{split} has {', '.join(unseen)}, which is never trained"))


def _add_twins(found: ConvertedFolder, folder: Path, labelled: Sequence[_Labelled], names: dict[str, str]) -> None:
    """Report images that lie in two classes with the same content; both stay, for a person to decide."""
    sizes: dict[int, list[_Labelled]] = {}
    for each in labelled:
        sizes.setdefault(each.image.stat().st_size, []).append(each)
    first: dict[bytes, _Labelled] = {}
    twins = []
    for each in (each for group in sizes.values() if len(group) > 1 for each in group):
        digest = hashlib.sha256(each.image.read_bytes()).digest()
        other = first.setdefault(digest, each)
        if names[other.label] != names[each.label]:
            twins.append(" = ".join(x.image.relative_to(folder).as_posix() for x in (other, each)))
    if twins:
        text = (
            f"in two classes: {number_of(len(twins), 'image')} ({', '.join(twins[:3])}); remove the wrong one of each"
        )
        found.facts.append(("contradictions", text))
