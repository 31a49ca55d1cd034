"""Apply the concept filter to a file of captions and write the selected rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from lora_llava.core.errors import UserError
from lora_llava.core.storage import atomic_file
from lora_llava.data.concepts.concept_filter import ConceptReport, filter_captions
from lora_llava.data.concepts.noun_phrases import NounPhrases
from lora_llava.data.files.row_files import data_file, iterate_rows, json_text


def caption_of(row: Mapping[str, Any], column: str = "caption") -> str:
    """Return a row's caption: its column, or the answer of its conversation, as in LLaVA's `chat.json`.

    Raises:
        UserError: If the row has neither.
    """
    if isinstance(row, Mapping) and column in row:
        return "" if row[column] is None else str(row[column])
    messages = row.get("conversations") if isinstance(row, Mapping) else None
    answers = [m["value"] for m in messages or () if isinstance(m, Mapping) and m.get("from") == "gpt" and "value" in m]
    if len(answers) != 1:
        found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        name = f"row {row['id']}" if isinstance(row, Mapping) and "id" in row else "a row"
        raise UserError(
            f"{name} has no {column} and no conversation of one answer; it has {found}; name it by --caption-column"
        )
    return str(answers[0])


def filter_caption_file(
    source: Path,
    target: Path,
    *,
    noun_phrases: NounPhrases,
    column: str = "caption",
    minimum: int = 3,
    maximum: int = 100,
    seed: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda rows: rows,
) -> ConceptReport:
    """Filter a file of captions.

    Args:
        source: JSON, JSONL, CSV, TSV or Parquet; read once.
        target: JSON or JSONL; renamed into place when it is complete.
        noun_phrases: From `load_noun_phrases`.
        column: The column of the caption in rows that are not conversations.
        minimum: See `filter_captions`.
        maximum: See `filter_captions`.
        seed: See `filter_captions`.
        progress: See `filter_captions`.

    Returns:
        Counts of kept and dropped rows.

    Raises:
        UserError: If the file is missing, a row has no caption, or the target exists or is of another kind.
    """
    file = data_file(source, "captions")
    if target.suffix.lower() not in (".json", ".jsonl"):
        raise UserError(f"--output: {target} should be called .json or .jsonl")
    if target.exists():
        raise UserError(f"--output: {target} is there already; name another file")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as temporary:
        with temporary.open("w", encoding="utf-8") as stream:
            writer = _Writer(stream, as_list=target.suffix.lower() == ".json")
            report = filter_captions(
                iterate_rows(file),
                writer.write,
                noun_phrases=noun_phrases,
                caption_of=lambda row: caption_of(row, column),
                minimum=minimum,
                maximum=maximum,
                seed=seed,
                progress=progress,
            )
            writer.close()
    return report


class _Writer:
    """Writer of rows as JSON lines, or as one list with one row per line."""

    def __init__(self, stream: TextIO, as_list: bool) -> None:
        self.stream, self.as_list, self.count = stream, as_list, 0

    def write(self, row: Mapping[str, Any]) -> None:
        before = ("[\n" if self.count == 0 else ",\n") if self.as_list else ""
        self.stream.write(before + json_text(row) + ("" if self.as_list else "\n"))
        self.count += 1

    def close(self) -> None:
        if self.as_list:
            self.stream.write("\n]\n" if self.count else "[]\n")
