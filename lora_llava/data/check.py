"""What is wrong, or odd, with rows: found in their encoded tables and their pictures, before any training."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_llava.data.encoded import EncodedTable, answer_starts
from lora_llava.data.formats import LEADING_ANSWER_CUT, OPEN_QUESTION_CUT, PLACEHOLDER_ADDED
from lora_llava.data.picture_check import Picture
from lora_llava.data.rows import Policy

_NOTES = {
    PLACEHOLDER_ADDED: "a picture is named but no <image> stands in the text; it is put where data.image_position says",
    LEADING_ANSWER_CUT: "the conversation starts with an answer, which is left out, as LLaVA does",
    OPEN_QUESTION_CUT: "the conversation ends with a question, which is left out",
}
LEAK, SHARED = "held-out row in train", "held-out picture in train"
DUPLICATE, SPECIAL = "duplicate row", "special token in text"
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
        pictures: What was found about the source's pictures, by name.
    """

    split: str
    name: str
    table: EncodedTable
    rows: np.ndarray
    pictures: Mapping[str, Picture]

    def finding(self, kind: str, row: int, message: str, dropped: bool = False) -> Finding:
        told = f"{message}: the row is dropped" if dropped else message
        name = self.table.row_name(row)
        return Finding(kind, self.table.row_ids[row], told, row, self.name, self.split, dropped, name)


def check_sources(
    sources: Sequence[CheckedSource], policies: Mapping[str, Policy], *, special_ids: Iterable[int],
    stop_id: int | None, image_id: int, num_image_tokens: int, leaks_are_errors: bool = True,
    with_pictures: Container[str] = (),
) -> CheckReport:  # fmt: skip
    """Find everything.

    Args:
        sources: What the splits consist of, training first.
        policies: By split.
        special_ids: The tokenizer's special tokens, `<image>` aside.
        stop_id: The one of them that ends an answer; None where the stop is ordinary text.
        image_id: The id of `<image>`.
        num_image_tokens: How many of them a picture has.
        leaks_are_errors: Whether a held-out row that is also trained on is an error, or, in a published split that
            nobody here can mend, a warning.
        with_pictures: Sources that are said to have pictures: not to see one is an error.

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
        report.warnings += _special(source, frozenset(special_ids), stop_id)
        errors, warnings = _pictures(source, policy)
        report.errors += errors
        report.warnings += warnings
    report.errors += _whole(sources, with_pictures)
    report.warnings += _duplicates(sources)
    report.warnings += _shared_pictures(sources)
    (report.errors if leaks_are_errors else report.warnings).extend(_leaks(sources))
    for split in dict.fromkeys(source.split for source in sources):
        mine = [source for source in sources if source.split == split]
        report.splits[split] = _figures(mine, policies[split], num_image_tokens)
    return report


def _bad_rows(source: CheckedSource, policy: Policy) -> Iterator[Finding]:
    for row in source.rows[np.isin(source.rows, source.table.problems.where())]:
        problem = source.table.problem(int(row))
        assert problem is not None  # it is among those that have one
        yield source.finding(problem.kind, int(row), str(problem), policy.on_bad_row == "drop")


def _whole(sources: Sequence[CheckedSource], with_pictures: Container[str]) -> Iterator[Finding]:
    """What is wrong with a source in all its splits, and with a split in all its sources."""
    for name in dict.fromkeys(source.name for source in sources):
        mine = [source for source in sources if source.name == name]
        sound = np.concatenate([_sound(source) for source in mine])
        if not len(sound):
            rows = sum(len(source.rows) for source in mine)
            what = f"none of its {rows:,} rows can be used" if rows else "it has no rows"
            yield Finding("no rows", "", f"{name}: {what}", -1, name, mine[0].split)
        elif name in with_pictures and not mine[0].table.pictures[sound].any():
            told = "no row names a picture, though data.image_folder or data.columns.image is set; see data.columns"
            yield Finding("no pictures", "", f"{name}: {told}", -1, name, mine[0].split)
    for split in dict.fromkeys(source.split for source in sources):
        mine = [source for source in sources if source.split == split]
        elsewhere = any(len(_sound(source)) for source in sources if source.name == mine[0].name)
        if elsewhere and not any(len(_sound(source)) for source in mine):
            yield Finding("no rows", "", f"{split}: it has no rows", -1, mine[0].name, split)


def _mended(source: CheckedSource) -> Iterator[Finding]:
    for row in source.rows[np.isin(source.rows, source.table.notes.where())]:
        for note in source.table.notes[int(row)].split("\0"):
            yield source.finding(note, int(row), _NOTES.get(note, note))


def _overlong(
    source: CheckedSource, policy: Policy, shape: tuple[int, int]
) -> tuple[list[Finding], list[Finding]]:  # fmt: skip
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


def _special(source: CheckedSource, special_ids: frozenset[int], stop_id: int | None) -> Iterator[Finding]:
    """Texts that hold what the template itself writes, such as `</s>`: the model would take it for the end."""
    for row in source.rows:
        ids, trained = source.table.row(int(row))
        found = np.flatnonzero(np.isin(ids[1:], list(special_ids)))
        if not len(found):
            continue
        stops = int((np.diff(trained.astype(np.int8), append=0) == -1).sum()) if stop_id is not None else 0
        if len(found) > stops:
            yield source.finding(
                SPECIAL, int(row), "its text holds a special token such as </s>, which the model takes for its own end"
            )


def _pictures(source: CheckedSource, policy: Policy) -> tuple[list[Finding], list[Finding]]:
    errors: list[Finding] = []
    warnings: list[Finding] = []
    dropped = policy.on_bad_image == "drop"
    for row in source.rows:
        for name in source.table.images(int(row)):
            picture = source.pictures.get(name)
            if picture is None:
                continue
            if picture.problem is not None:
                bad = source.finding(picture.kind, int(row), picture.problem, dropped)
                (warnings if dropped else errors).append(bad)
            warnings += [source.finding(kind, int(row), message) for kind, message in picture.oddities]
    return errors, warnings


def _key(source: CheckedSource, row: int, asked_only: bool) -> bytes:
    """What makes two rows the same: their text, or what is asked in it, and what their pictures show."""
    ids, trained = source.table.row(row)
    digest = hashlib.sha256((ids[~trained] if asked_only else ids).tobytes())
    for name in source.table.images(row):
        picture = source.pictures.get(name)
        digest.update((picture.digest if picture and picture.digest else name).encode("utf-8", "surrogatepass"))
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


def _leaks(sources: Sequence[CheckedSource]) -> Iterator[Finding]:
    """Training rows that ask what a held-out row asks, of the same pictures."""
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
                    LEAK, row, f"it asks what {other.split} {other.table.row_name(number)} asks, of the same "
                    "pictures; take it out of one of them"
                )  # fmt: skip


def _shared_pictures(sources: Sequence[CheckedSource]) -> Iterator[Finding]:
    """Training rows that show a picture of a held-out row, under this name or another."""
    held: dict[str, str] = {}
    for source in (source for source in sources if source.split != "train"):
        for row in map(int, _sound(source)):
            for digest in _digests(source, row):
                held.setdefault(digest, f"{source.split} {source.table.row_name(row)}")
    for source in (source for source in sources if source.split == "train"):
        for row in map(int, _sound(source)):
            found = next((held[digest] for digest in _digests(source, row) if digest in held), None)
            if found is not None:
                yield source.finding(SHARED, row, f"it shows a picture that {found} shows")


def _digests(source: CheckedSource, row: int) -> list[str]:
    pictures = (source.pictures.get(name) for name in source.table.images(row))
    return [picture.digest for picture in pictures if picture is not None and picture.digest]


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
        "rows_with_pictures": int(sum((source.table.pictures[_sound(source)] > 0).sum() for source in sources)),
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
    }  # fmt: skip
