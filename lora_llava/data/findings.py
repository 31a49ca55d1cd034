"""Checks of rows and images before training: errors and warnings about each row and source."""

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
    PLACEHOLDER_ADDED: "the row has an image but its text no <image>; it is added as data.image_position says",
    LEADING_ANSWER_CUT: "the conversation starts with an answer, which is removed, as in LLaVA",
    OPEN_QUESTION_CUT: "the conversation ends with a question, which is removed",
}
LEAK, SHARED = "held-out row in train", "held-out image in train"
DUPLICATE = "duplicate row"
_WIDTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_MOST_BINS = 16


@dataclass(frozen=True)
class Finding:
    """A finding about a row, a source or a split.

    Attributes:
        kind: The kind of finding, in a word or two.
        row: The row's id.
        message: The finding in a sentence, with the fix if there is one.
        number: The row's index in its source; -1 for a finding about a source or split.
        source: The source's name.
        split: The row's split.
        dropped: Whether the recipe drops the row because of it.
        name: The row's name in messages, such as `row a (rows.csv, line 2)`; empty for a source or split.
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
    """The result of a check.

    Attributes:
        rows: Number of rows read, in all splits.
        errors: Findings that would stop the run or invalidate its results.
        warnings: Other findings.
        splits: Statistics by split.
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
    """The rows of one source in one split.

    Attributes:
        split: The split's name.
        name: The source's name.
        table: The source's encoded rows.
        rows: The indices of the rows in the split.
        images: The facts about the source's images, by name.
    """

    split: str
    name: str
    table: EncodedTable
    rows: np.ndarray
    images: Mapping[str, ImageFacts]

    def finding(self, kind: str, row: int, message: str, dropped: bool = False) -> Finding:
        message = f"{message}: the row is dropped" if dropped else message
        name = self.table.row_name(row)
        return Finding(kind, self.table.row_ids[row], message, row, self.name, self.split, dropped, name)


def check_sources(
    sources: Sequence[CheckedSource],
    policies: Mapping[str, Policy],
    *,
    image_id: int,
    num_image_tokens: int,
    leaks_are_errors: bool = True,
    with_images: Container[str] = (),
) -> CheckReport:
    """Run all checks.

    Args:
        sources: The parts of the splits, training first.
        policies: The policy of each split.
        image_id: The id of `<image>`.
        num_image_tokens: The number of tokens of an image.
        leaks_are_errors: Whether a held-out row that is also trained on is an error. In a published split, which cannot
            be fixed here, it is a warning.
        with_images: Sources that should have images, by the recipe or by images beside them; without images they are
            errors. So is any source in which a column that is not read seems to name images.

    Returns:
        The report, with findings in the order of the rows.
    """
    report = CheckReport(rows=sum(len(source.rows) for source in sources))
    shape = (image_id, num_image_tokens)
    for source in sources:
        policy = policies[source.split]
        (report.errors if policy.on_bad_row == "error" else report.warnings).extend(_bad_rows(source, policy))
        errors, warnings = _overlong(source, policy, shape)
        report.errors += errors
        report.warnings += warnings
        report.warnings += _repaired(source)
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
        assert problem is not None  # the row is among those with a problem
        yield source.finding(problem.kind, int(row), str(problem), policy.on_bad_row == "drop")


def whole_source_errors(sources: Sequence[CheckedSource], with_images: Container[str]) -> Iterator[Finding]:
    """Find errors of complete sources and of complete splits.

    Args:
        sources: See `check_sources`.
        with_images: See `check_sources`.

    Yields:
        Findings about sources and splits without rows, and about sources without images that should have some.
    """
    for name in dict.fromkeys(source.name for source in sources):
        mine = [source for source in sources if source.name == name]
        sound = np.concatenate([_sound(source) for source in mine])
        if not len(sound):
            rows = sum(len(source.rows) for source in mine)
            what = f"none of its {rows:,} rows can be used" if rows else "it has no rows"
            yield Finding("no rows", "", f"{name}: {what}; fix its rows, or remove the source", -1, name, mine[0].split)
        elif not mine[0].table.image_counts[sound].any():
            column, rows = _unread_images(mine[0].table, sound)
            if column is not None or name in with_images:
                yield Finding("no images", "", _no_images(name, column, rows, len(sound)), -1, name, mine[0].split)
    for split in dict.fromkeys(source.split for source in sources):
        mine = [source for source in sources if source.split == split]
        elsewhere = any(len(_sound(source)) for source in sources if source.name == mine[0].name)
        if elsewhere and not any(len(_sound(source)) for source in mine):
            yield Finding(
                "no rows", "", f"{split}: it has no rows; add some, or remove the split", -1, mine[0].name, split
            )


def _unread_images(table: EncodedTable, rows: np.ndarray) -> tuple[str | None, int]:
    """Return the column in which most of these rows seem to name images, and how many; see `likely_image_column`."""
    found: Counter[str] = Counter()
    for row in rows[np.isin(rows, table.notes.where())]:
        notes = table.notes[int(row)].split("\0")
        found.update(note.removeprefix(IMAGE_NOT_READ) for note in notes if note.startswith(IMAGE_NOT_READ))
    return found.most_common(1)[0] if found else (None, 0)


def _no_images(name: str, column: str | None, rows: int, total: int) -> str:
    if column is not None:
        return (
            f"{name}: no row has an image, and the column {column} seems to name one in {rows:,} of {total:,} rows; "
            f"set data.columns: {{image: {column}}}, or remove the column to train on text alone"
        )
    return (
        f"{name}: no row names an image, though data.image_folder or data.columns.image is set, or images are beside "
        "the file; name their column with data.columns: {image: ...}, or, to train on text alone, set neither and move "
        "the file to a folder without images"
    )


def _note_in_words(note: str) -> tuple[str, str]:
    """Return the kind and the message of a note."""
    if note.startswith(IMAGE_NOT_READ):
        column = note.removeprefix(IMAGE_NOT_READ)
        return "image not read", (
            f"it has no image, and the column {column} seems to name one; set data.columns: {{image: {column}}}, or "
            "rename the column"
        )
    return note, _NOTES.get(note, note)


def _repaired(source: CheckedSource) -> Iterator[Finding]:
    for row in source.rows[np.isin(source.rows, source.table.notes.where())]:
        for note in source.table.notes[int(row)].split("\0"):
            kind, message = _note_in_words(note)
            yield source.finding(kind, int(row), message)


def _overlong(source: CheckedSource, policy: Policy, shape: tuple[int, int]) -> tuple[list[Finding], list[Finding]]:
    """Return errors and warnings about rows over the limit, by the recipe's policy."""
    image_id, num_image_tokens = shape
    lengths = source.table.lengths(num_image_tokens)[source.rows]
    long = np.flatnonzero(lengths > policy.max_length)
    starts = answer_starts(source.table, source.rows[long], image_id, num_image_tokens)
    errors, warnings = [], []
    for place, start in zip(long, starts, strict=True):
        row, length = int(source.rows[place]), int(lengths[place])
        message = f"it has {length:,} tokens, over data.max_length {policy.max_length:,}"
        if policy.on_overlong == "drop":
            warnings.append(source.finding("overlong", row, message, dropped=True))
        elif policy.on_overlong == "error":
            fix = "raise it, or set data.on_overlong to drop or truncate_answer"
            errors.append(source.finding("overlong", row, f"{message}; {fix}"))
        elif start >= policy.max_length:
            cut = f"{message}, and its last answer starts at token {start:,}: nothing of it would be left"
            errors.append(source.finding("overlong", row, cut))
        else:
            cut = f"{message}: the last {length - policy.max_length:,} tokens of its answer are cut"
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


def _key(source: CheckedSource, row: int, question_only: bool) -> bytes:
    """Return a hash of a row's text, or only its question, and of its images' contents."""
    ids, trained = source.table.row(row)
    digest = hashlib.sha256((ids[~trained] if question_only else ids).tobytes())
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
                    DUPLICATE, row, f"it has the text and images of {other.table.row_name(number)}{of}"
                )


def asked_again(sources: Sequence[CheckedSource]) -> dict[int, list[str]]:
    """Return the images that decide whether a held-out row is trained on, by the index of their source.

    They are the images of rows whose question is also asked by a row on the other side.
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
    """Find training rows with the question and images of a held-out row.

    Args:
        sources: The parts of the splits, with the facts about the images from `asked_again`.

    Yields:
        A finding for each such training row.
    """
    held_out: dict[bytes, tuple[CheckedSource, int]] = {}
    for source in (source for source in sources if source.split != "train"):
        for row in map(int, _sound(source)):
            held_out.setdefault(_key(source, row, True), (source, row))
    for source in (source for source in sources if source.split == "train"):
        for row in map(int, _sound(source)):
            found = held_out.get(_key(source, row, True))
            if found is not None:
                other, number = found
                yield source.finding(
                    LEAK,
                    row,
                    f"it has the question and images of {other.split} {other.table.row_name(number)}; remove it "
                    "from one of them",
                )


def _shared_images(sources: Sequence[CheckedSource]) -> Iterator[Finding]:
    """Find training rows with an image of a held-out row, under any name."""
    held_out: dict[str, str] = {}
    for source in (source for source in sources if source.split != "train"):
        for row in map(int, _sound(source)):
            for digest in _digests(source, row):
                held_out.setdefault(digest, f"{source.split} {source.table.row_name(row)}")
    for source in (source for source in sources if source.split == "train"):
        for row in map(int, _sound(source)):
            found = next((held_out[digest] for digest in _digests(source, row) if digest in held_out), None)
            if found is not None:
                yield source.finding(SHARED, row, f"it has an image of {found}")


def _digests(source: CheckedSource, row: int) -> list[str]:
    images = (source.images.get(name) for name in source.table.images(row))
    return [image.digest for image in images if image is not None and image.digest]


def _figures(sources: Sequence[CheckedSource], policy: Policy, num_image_tokens: int) -> dict[str, Any]:
    """Return the statistics of a split: rows, tokens, trained tokens, and a histogram of lengths."""
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
