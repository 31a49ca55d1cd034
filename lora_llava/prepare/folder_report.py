"""Prints what `init` understood of a folder, before anything is written."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table as RichTable

from lora_llava.data.folder_data import FolderData
from lora_llava.data.folder_kinds.folder_kind import number_of
from lora_llava.data.sources import file_remarks
from lora_llava.pages.preview_samples import escape_hidden

_LONGEST = 300
"""Most characters of a text of an example."""


def print_found(found: FolderData, validation: str, console: Console) -> None:
    """Print the kind of folder, its rows, splits and images, what is not used, and two rows.

    Args:
        found: The folder.
        validation: Which rows are held out for validation, in words.
        console: Prints it.
    """
    table = RichTable(title="Found data", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in _facts(found, validation):
        if value:
            table.add_row(name, "\n".join(map(escape_hidden, value.splitlines())))
    for number, (image, question, answer) in enumerate(found.examples, 1):
        lines = ([f"image: {image}"] if image else []) + [f"question: {question}", f"answer: {answer}"]
        name = "an example" if number == 1 else "another"
        table.add_row(name, "\n".join(escape_hidden(_short(line)) for line in lines))
    console.print(table)


def _facts(found: FolderData, validation: str) -> list[tuple[str, str]]:
    converted = found.converted is not None
    origin = "" if converted else f" in {found.file}{_and_shards(found)}"
    splits = {split: rows for split, rows in found.split_rows.items() if split != "train"}
    test = (
        ""
        if found.test is None
        else number_of(splits.get("test", 0), "row") + ("" if converted else f" in {found.test}")
    )
    images = f"{found.named:,} named by rows, {found.images:,} in the {'shards' if _is_packed(found) else 'folder'}"
    root = "in the table" if found.embedded else "none: text only"
    return [
        ("kind", found.kind),
        ("rows", f"{found.rows:,}{origin}"),
        ("format", "" if converted else found.shape),
        *found.facts,
        ("images", images),
        ("image folder", str(found.image_folder or root)),
        ("read as", "; ".join(remark for _, remark in file_remarks(() if converted else found.files))),
        ("not used", ", ".join(found.unused)),
        ("left out", "\n".join(found.left_out)),
        ("validation", validation),
        ("test", test),
    ]


def _is_packed(found: FolderData) -> bool:
    return found.converted is not None and bool(found.converted.packed)


def _and_shards(found: FolderData) -> str:
    return f" to {found.files[-1].name}, {len(found.files):,} files" if len(found.files) > 1 else ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
