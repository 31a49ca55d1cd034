"""Tables of an image and its label: whether the label is a class or a caption, and the question asked about a class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.data.folder_kinds.folder_kind import (
    SPLITS,
    ConvertedFolder,
    FolderOptions,
    ask_question,
    class_question,
    class_text,
    counted,
    number_of,
    refuse_one_class,
)

_MOST_WORDS = 4
"""Words of a class name; a longer label is a caption."""
_MEANS = {
    "class": "a class: few different labels of few words; --label-is caption if they are descriptions",
    "caption": "a caption: many different labels, or sentences; --label-is class if they are classes",
}


def label_kind(labels: Sequence[str], options: FolderOptions, where: str) -> tuple[str, str]:
    """Decide whether labels are classes or captions.

    They are classes if at most two in three of them differ, and nearly all have four words or fewer.

    Args:
        labels: The labels of all rows.
        options: What the person chose; on a terminal they are asked.
        where: The file and column, for the question.

    Returns:
        `class` or `caption`, and why.
    """
    if options.label_is is not None:
        options.used.add("label_is")
        return options.label_is, f"a {options.label_is}, as --label-is says"
    short = sum(len(label.split()) <= _MOST_WORDS for label in labels)
    different = len(set(labels))
    likely = "class" if different <= max(1, 2 * len(labels) // 3) and short >= 0.95 * len(labels) else "caption"
    example = ", ".join(label[:40] for label in dict.fromkeys(labels[:50]))[:120]
    question = f"{where} has {different:,} different labels, such as {example}. Is a label a class or a caption?"
    chosen = options.asker.choose(question, ("class", "caption"), likely) or likely
    return chosen, _MEANS[chosen] if chosen == likely else f"a {chosen}, as chosen"


def class_rows(
    found: ConvertedFolder,
    rows: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]],
    columns: tuple[str, str, str],
    options: FolderOptions,
    where: str,
) -> None:
    """Add a row with a question to a folder for each row of a table with a class.

    Args:
        found: The folder that is converted.
        rows: The rows of each split with their places.
        columns: The column of images, that of classes, and what to call it in messages.
        options: What the person chose.
        where: The file, for messages.

    Raises:
        UserError: If all rows have one class, or none has an image and a class.
    """
    usable = {split: _usable(found, each, *columns) for split, each in rows.items()}
    names = _spelling(label for each in usable.values() for _, _, label in each)
    if not names:
        raise UserError(
            f"{where}: no row has a value in {columns[0]} and in {columns[2]}; fill them in, or name other columns: "
            "--columns image=NAME,label=NAME"
        )
    refuse_one_class({names[label] for _, _, label in usable.get("train", ())}, where)
    question = ask_question(options, class_question(names.values()))
    seen: dict[str, set[str]] = {}
    for split in (split for split in SPLITS if split in usable):
        each = usable[split]
        for place, image, label in each:
            seen.setdefault(image, set()).add(names[label])
            row = {"id": f"{place}", "image": image, "question": question, "answer": names[label]}
            found.add(split, row)
        counts = Counter(names[label] for _, _, label in each)
        found.facts.append((f"classes in {split}" if len(usable) > 1 else "classes", counted(counts)))
    found.facts.append(("question", question))
    if all(label.isdecimal() for label in names):
        found.facts.append(("class names", "numbers only; a model learns words better: write the names into the table"))
    _add_contradictions(found, seen, where)


def _usable(
    found: ConvertedFolder,
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    image_column: str,
    label_column: str,
    title: str,
) -> list[tuple[str, str, str]]:
    """Return place, image and label of the rows that have both."""
    usable = []
    for place, row in rows:
        image, label = (_text(row.get(column)) for column in (image_column, label_column))
        if not label:
            found.left_out.add(f"rows without a value in {title}", place)
        elif not image:
            found.left_out.add(f"rows without a value in {image_column}", place)
        else:
            usable.append((place, image, label))
    return usable


def _text(value: Any) -> str:
    if value is None or value != value:  # NaN != NaN
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() if isinstance(value, (str, int, float)) else ""


def _spelling(labels: Any) -> dict[str, str]:
    """Return the class of each label; labels that differ only in capitals or underscores are spelt as most are."""
    counts = Counter(labels)
    groups: dict[str, list[str]] = {}
    for label in sorted(counts, key=lambda name: -counts[name]):
        groups.setdefault(class_text(label).casefold(), []).append(label)
    return {label: class_text(group[0]) for group in groups.values() for label in group}


def _add_contradictions(found: ConvertedFolder, seen: Mapping[str, set[str]], where: str) -> None:
    twice = [f"{image}: {' / '.join(sorted(labels))}" for image, labels in seen.items() if len(labels) > 1]
    if twice:
        count = number_of(len(twice), "image")
        text = f"two classes for one image in {where}: {count} ({'; '.join(twice[:3])}); correct the wrong rows"
        found.facts.append(("contradictions", text))
    answers = {label.casefold() for labels in seen.values() for label in labels}
    differ = [
        image
        for image, labels in seen.items()
        if (above := class_text(PurePosixPath(image.replace("\\", "/")).parent.name).casefold()) in answers
        and above not in {label.casefold() for label in labels}
    ]
    if differ:
        count = number_of(len(differ), "image")
        text = f"in the folder of another class than {where} says: {count} ({', '.join(differ[:3])})"
        found.facts.append(("contradictions", f"{text}; the table counts; correct the wrong ones"))


def refuse_unlabelled(found: ConvertedFolder, where: str) -> None:
    """Refuse a table of which no row is left.

    Raises:
        UserError: If there are no training rows.
    """
    if not found.splits.get("train"):
        raise UserError(f"{where}: no row has an image and a label; {'; '.join(found.left_out.lines())}; fill them in")
