"""What is wrong, or odd, with rows: found in their encoded tables and their images, before any training."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_llava.data.encoded import EncodedTable, answer_starts
from lora_llava.data.formats import IMAGE_NOT_READ, LEADING_ANSWER_CUT, OPEN_QUESTION_CUT, PLACEHOLDER_ADDED
from lora_llava.data.images.image_check import ImageFacts
from lora_llava.data.selection import Policy

_NOTES = {
    PLACEHOLDER_ADDED: "an image is named but no <image> stands in the text; it is put where data.image_position says",
    LEADING_ANSWER_CUT: "the conversation starts with an answer, which is left out, as LLaVA does",
    OPEN_QUESTION_CUT: "the conversation ends with a question, which is left out",
}
LEAK, SHARED = "held-out row in train", "held-out image in train"
DUPLICATE = "duplicate row"
_WIDTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_MOST_BINS = 16


@dataclass(frozen=True)
class Finding:
    """One thing about one row.

    Attributes:
        kind: What it is, in a word or two.
        row: The row's id.
        message: What it is, in a sentence, with the mend where there is one.
        number: The row's place in its source, from 0; -1 for a finding about the source or split as a whole.
        source: The source's name.
        split: The row's split.
        dropped: Whether the recipe leaves the row out for it.
        name: How messages name the row, such as `row a (rows.csv, line 2)`; nothing for a source or split.
    """

    kind: str
    row: str
    message: str
    number: int
    source: str
    split: str
    dropped: bool = False
    name: str = ""


@dataclass
class CheckReport:
    """What a check found.

    Attributes:
        rows: Rows read, of all splits.
        errors: What would stop the run, or make its figures untrue.
        warnings: What a person may want to know.
        splits: Figures by split.
    """

    rows: int = 0
    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "errors": [finding.__dict__ for finding in self.errors],
            "warnings": [finding.__dict__ for finding in self.warnings],
            "splits": self.splits,
        }


@dataclass(frozen=True)
class CheckedSource:
    """One source's part in one split.

    Attributes:
        split: The split's name.
        name: The source's name.
        table: The source's rows.
        rows: Which of them belong to the split.
        images: What was found about the source's images, by name.
    """

    split: str
    name: str
    table: EncodedTable
    rows: np.ndarray
    images: Mapping[str, ImageFacts]

    def finding(self, kind: str, row: int, message: str, dropped: bool = False) -> Finding:
        told = f"{message}: the row is dropped" if dropped else message
        name = self.table.row_name(row)
        return Finding(kind, self.table.row_ids[row], told, row, self.name, self.split, dropped, name)


def check_sources(
    sources: Sequence[CheckedSource],
    policies: Mapping[str, Policy],
    *,
    image_id: int,
    num_image_tokens: int,
    leaks_are_errors: bool = True,
    with_images: Container[str] = (),
) -> CheckReport:
    """Find everything.

    Args:
        sources: What the splits consist of, training first.
        policies: By split.
        image_id: The id of `<image>`.
        num_image_tokens: How many of them an image has.
        leaks_are_errors: Whether a held-out row that is also trained on is an error, or, in a published split that
            nobody here can mend, a warning.
        with_images: Sources that should have images by the recipe or by what is beside them: none is an error. It is
            for any source of which a column that is not read seems to name images.

    Returns:
        The report, findings in the order of the rows.
    """
    report = CheckReport(rows=sum(len(source.rows) for source in sources))
    shape = (image_id, num_image_tokens)
    for source in sources:
        policy = policies[source.split]
        (report.errors if policy.on_bad_row == "error" else report.warnings).extend(_bad_rows(source, policy))
        errors, warnings = _overlong(source, policy, shape)
        report.errors += errors
        report.warnings += warnings
        report.warnings += _mended(source)
        errors, warnings = _images(source, policy)
        report.errors += errors
        report.warnings += warnings
    report.errors += whole_source_errors(sources, with_images)
    report.warnings += _duplicates(sources)
    report.warnings += _shared_images(sources)
    (report.errors if leaks_are_errors else report.warnings).extend(leaks(sources))
    for split in dict.fromkeys(source.split for source in sources):
        mine = [source for source in sources if source.split == split]
        report.splits[split] = _figures(mine, policies[split], num_image_tokens)
    return report


def _bad_rows(source: CheckedSource, policy: Policy) -> Iterator[Finding]:
    for row in source.rows[np.isin(source.rows, source.table.problems.where())]:
        problem = source.table.problem(int(row))
        assert problem is not None  # it is among those that have one
        yield source.finding(problem.kind, int(row), str(problem), policy.on_bad_row == "drop")


def whole_source_errors(sources: Sequence[CheckedSource], with_images: Container[str]) -> Iterator[Finding]:
    """Find what is wrong with a source in all its splits, and with a split in all its sources.

    Args:
        sources: See `check_sources`.
        with_images: See `check_sources`.

    Yields:
        Errors: a source or split without rows, and a source that should have images and has none.
    """
    for name in dict.fromkeys(source.name for source in sources):
        mine = [source for source in sources if source.name == name]
        sound = np.concatenate([_sound(source) for source in mine])
        if not len(sound):
            rows = sum(len(source.rows) for source in mine)
            what = f"none of its {rows:,} rows can be used" if rows else "it has no rows"
            yield Finding("no rows", "", f"{name}: {what}", -1, name, mine[0].split)
        elif not mine[0].table.image_counts[sound].any():
            column, rows = _unread_images(mine[0].table, sound)
            if column is not None or name in with_images:
                yield Finding("no images", "", _no_images(name, column, rows, len(sound)), -1, name, mine[0].split)
    for split in dict.fromkeys(source.split for source in sources):
        mine = [source for source in sources if source.split == split]
        elsewhere = any(len(_sound(source)) for source in sources if source.name == mine[0].name)
        if elsewhere and not any(len(_sound(source)) for source in mine):
            yield Finding("no rows", "", f"{split}: it has no rows", -1, mine[0].name, split)


def _unread_images(table: EncodedTable, rows: np.ndarray) -> tuple[str | None, int]:
    """The column that most of these rows seem to name images in, and in how many; see `likely_image_column`."""
    found: Counter[str] = Counter()
    for row in rows[np.isin(rows, table.notes.where())]:
        notes = table.notes[int(row)].split("\0")
        found.update(note.removeprefix(IMAGE_NOT_READ) for note in notes if note.startswith(IMAGE_NOT_READ))
    return found.most_common(1)[0] if found else (None, 0)


def _no_images(name: str, column: str | None, rows: int, total: int) -> str:
    if column is not None:
        return (
            f"{name}: no row has an image, and the column {column} seems to name one in {rows:,} of {total:,} rows; "
            f"set data.columns: {{image: {column}}}, or take the column out to train on text alone"
        )
    return (
        f"{name}: no row names an image, though data.image_folder or data.columns.image is set, or images are beside "
        "the file; name their column with data.columns: {image: ...}, or, to train on text alone, set neither and move "
        "the file to a folder without images"
    )


def _note_in_words(note: str) -> tuple[str, str]:
    """A note's kind and its message."""
    if note.startswith(IMAGE_NOT_READ):
        column = note.removeprefix(IMAGE_NOT_READ)
        return "image not read", (
            f"it has no image, and the column {column} seems to name one; set data.columns: {{image: {column}}}, or "
            "call the column as the others do"
        )
    return note, _NOTES.get(note, note)


def _mended(source: CheckedSource) -> Iterator[Finding]:
    for row in source.rows[np.isin(source.rows, source.table.notes.where())]:
        for note in source.table.notes[int(row)].split("\0"):
            kind, message = _note_in_words(note)
            yield source.finding(kind, int(row), message)


def _overlong(source: CheckedSource, policy: Policy, shape: tuple[int, int]) -> tuple[list[Finding], list[Finding]]:
    """Rows over the limit: what the recipe's word makes of each."""
    image_id, num_image_tokens = shape
    lengths = source.table.lengths(num_image_tokens)[source.rows]
    long = np.flatnonzero(lengths > policy.max_length)
    starts = answer_starts(source.table, source.rows[long], image_id, num_image_tokens)
    errors, warnings = [], []
    for place, start in zip(long, starts, strict=True):
        row, length = int(source.rows[place]), int(lengths[place])
        told = f"it has {length:,} tokens, over data.max_length {policy.max_length:,}"
        if policy.on_overlong == "drop":
            warnings.append(source.finding("overlong", row, told, dropped=True))
        elif policy.on_overlong == "error":
            mend = "raise it, or set data.on_overlong to drop or truncate_answer"
            errors.append(source.finding("overlong", row, f"{told}; {mend}"))
        elif start >= policy.max_length:
            cut = f"{told}, and its last answer starts at token {start:,}: nothing of it would be left"
            errors.append(source.finding("overlong", row, cut))
        else:
            cut = f"{told}: the last {length - policy.max_length:,} tokens of its answer are cut"
            warnings.append(source.finding("answer cut", row, cut))
    return errors, warnings


def _images(source: CheckedSource, policy: Policy) -> tuple[list[Finding], list[Finding]]:
    errors: list[Finding] = []
    warnings: list[Finding] = []
    dropped = policy.on_bad_image == "drop"
    for row in source.rows:
        for name in source.table.images(int(row)):
            image = source.images.get(name)
            if image is None:
                continue
            if image.problem is not None:
                bad = source.finding(image.kind, int(row), image.problem, dropped)
                (warnings if dropped else errors).append(bad)
            warnings += [source.finding(kind, int(row), message) for kind, message in image.oddities]
    return errors, warnings


def _key(source: CheckedSource, row: int, asked_only: bool) -> bytes:
    """What makes two rows the same: their text, or what is asked in it, and what their images show."""
    ids, trained = source.table.row(row)
    digest = hashlib.sha256((ids[~trained] if asked_only else ids).tobytes())
    for name in source.table.images(row):
        image = source.images.get(name)
        digest.update((image.digest if image and image.digest else name).encode("utf-8", "surrogatepass"))
    return digest.digest()[:16]


def _sound(source: CheckedSource) -> np.ndarray:
    return source.rows[~np.isin(source.rows, source.table.problems.where())]


def _duplicates(sources: Sequence[CheckedSource]) -> Iterator[Finding]:
    first: dict[tuple[str, bytes], tuple[CheckedSource, int]] = {}
    for source in sources:
        for row in map(int, _sound(source)):
            other, number = first.setdefault((source.split, _key(source, row, False)), (source, row))
            if (other, number) != (source, row):
                of = "" if other.name == source.name else f" of {other.name}"
                yield source.finding(
                    DUPLICATE, row, f"it says and shows the same as {other.table.row_name(number)}{of}"
                )


def asked_again(sources: Sequence[CheckedSource]) -> dict[int, list[str]]:
    """Images by which it is decided whether a held-out row is trained on, by the source's place among these sources.

    They are those of rows whose question is the same as a row's on the other side, whatever their images show.
    """
    texts: dict[bool, dict[bytes, list[tuple[int, int]]]] = {True: {}, False: {}}
    for place, source in enumerate(sources):
        for row in map(int, _sound(source)):
            ids, trained = source.table.row(row)
            key = hashlib.sha256(ids[~trained].tobytes()).digest()[:16]
            texts[source.split == "train"].setdefault(key, []).append((place, row))
    found: dict[int, dict[str, None]] = {}
    for key in texts[True].keys() & texts[False].keys():
        for place, row in texts[True][key] + texts[False][key]:
            found.setdefault(place, {}).update(dict.fromkeys(sources[place].table.images(row)))
    return {place: list(names) for place, names in found.items()}


def leaks(sources: Sequence[CheckedSource]) -> Iterator[Finding]:
    """Find training rows that ask what a held-out row asks, of the same images.

    Args:
        sources: What the splits consist of, with what is known of the images that `asked_again` names.

    Yields:
        A finding for each such training row.
    """
    held: dict[bytes, tuple[CheckedSource, int]] = {}
    for source in (source for source in sources if source.split != "train"):
        for row in map(int, _sound(source)):
            held.setdefault(_key(source, row, True), (source, row))
    for source in (source for source in sources if source.split == "train"):
        for row in map(int, _sound(source)):
            found = held.get(_key(source, row, True))
            if found is not None:
                other, number = found
                yield source.finding(
                    LEAK,
                    row,
                    f"it asks what {other.split} {other.table.row_name(number)} asks, of the same "
                    "images; take it out of one of them",
                )


def _shared_images(sources: Sequence[CheckedSource]) -> Iterator[Finding]:
    """Training rows that show an image of a held-out row, under this name or another."""
    held: dict[str, str] = {}
    for source in (source for source in sources if source.split != "train"):
        for row in map(int, _sound(source)):
            for digest in _digests(source, row):
                held.setdefault(digest, f"{source.split} {source.table.row_name(row)}")
    for source in (source for source in sources if source.split == "train"):
        for row in map(int, _sound(source)):
            found = next((held[digest] for digest in _digests(source, row) if digest in held), None)
            if found is not None:
                yield source.finding(SHARED, row, f"it shows an image that {found} shows")


def _digests(source: CheckedSource, row: int) -> list[str]:
    images = (source.images.get(name) for name in source.table.images(row))
    return [image.digest for image in images if image is not None and image.digest]


def _figures(sources: Sequence[CheckedSource], policy: Policy, num_image_tokens: int) -> dict[str, Any]:
    """Rows, tokens, share of trained tokens, and a histogram of lengths."""
    lengths = np.concatenate([source.table.lengths(num_image_tokens)[_sound(source)] for source in sources])
    trained = sum(int(source.table.supervised[_sound(source)].sum()) for source in sources)
    longest = int(lengths.max()) if len(lengths) else 0
    width = next((width for width in _WIDTHS if longest < width * _MOST_BINS), longest // _MOST_BINS + 1)
    places = Counter((lengths // width).tolist())
    over = np.maximum(lengths - policy.max_length, 0)
    return {
        "rows": int(sum(len(source.rows) for source in sources)),
        "sound_rows": len(lengths),
        "rows_with_images": int(sum((source.table.image_counts[_sound(source)] > 0).sum() for source in sources)),
        "sources": {source.name: len(source.rows) for source in sources},
        "tokens": int(lengths.sum()),
        "trained_tokens": trained,
        "longest": longest,
        "over_limit_rows": int((over > 0).sum()),
        "over_limit_tokens": int(over.sum()),
        "histogram": [
            {"from": place * width, "to": (place + 1) * width, "rows": places.get(place, 0)}
            for place in range(longest // width + 1)
        ],
    }
