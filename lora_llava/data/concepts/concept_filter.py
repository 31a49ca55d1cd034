"""LLaVA's concept filter: captions that cover the noun phrases of a large set, frequent phrases capped."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from operator import itemgetter
from random import Random
from typing import IO, Any

from lora_llava.core.errors import UserError

Row = Mapping[str, Any]

MOST_FREQUENT = 20
"""Phrases that a report names."""

_EMPTY, _NO_PHRASE, _RARE, _CAPPED, _KEPT = range(5)
"""The fates of a row; of several phrases' verdicts the highest counts."""
REASONS = {
    _EMPTY: "empty caption",
    _NO_PHRASE: "no noun phrase",
    _RARE: "rare phrases only",
    _CAPPED: "beyond the cap",
}


@dataclass(frozen=True)
class PhraseCount:
    """A phrase and the number of its captions, among all rows and among those kept."""

    phrase: str
    before: int
    after: int


@dataclass
class ConceptReport:
    """Counts of kept and dropped rows, and of phrases.

    Attributes:
        rows: Rows read.
        kept: Rows written.
        dropped: Rows dropped, by reason (the values of `REASONS`); with `kept` they add up to `rows`.
        phrases: Number of unique noun phrases.
        rare_phrases: Number of phrases with too few captions, which are skipped.
        capped_phrases: Number of phrases with more captions than were drawn.
        most_frequent: The most frequent phrases; phrases of equal count are in alphabetical order.
    """

    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    phrases: int = 0
    rare_phrases: int = 0
    capped_phrases: int = 0
    most_frequent: list[PhraseCount] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        counts = [entry.__dict__ for entry in self.most_frequent]
        return {**self.__dict__, "dropped": dict(self.dropped), "most_frequent": counts}


def filter_captions(
    rows: Iterable[Row],
    write: Callable[[Row], object],
    *,
    noun_phrases: Callable[[Sequence[str]], Iterable[list[str]]],
    caption_of: Callable[[Row], str],
    minimum: int = 3,
    maximum: int = 100,
    seed: int = 0,
    batch_size: int = 1024,
    progress: Callable[[Iterable[Row]], Iterable[Row]] = lambda rows: rows,
) -> ConceptReport:
    """Keep the captions that LLaVA's filter of CC3M would keep (arXiv 2304.08485, appendix "Data", CC3M).

    Noun phrases with fewer than `minimum` captions are skipped. Every other phrase selects its captions, or `maximum`
    of them at random if it has more; a row is kept if one of its phrases selects it. The paper adds phrases from the
    rarest on and draws from all captions of a phrase, whatever was added before; so the order does not matter, and
    phrases are processed in alphabetical order here. Since a kept caption may have other phrases, those may end with
    more than `maximum` captions.

    Rows and occurrences are kept on disk, in unnamed files in `TMPDIR` that the system removes when the process ends;
    rows with little more than a caption take about twice their size there. Memory holds one batch of captions, and
    two bytes per row.

    Args:
        rows: Read once, so it may be a generator over a pipe. Rows are kept as JSON until they are written.
        write: Writes a kept row; called in the original order after all rows have been read.
        noun_phrases: Returns a list of phrases for each caption, as from `load_noun_phrases`; a phrase that occurs
            twice in a caption counts once.
        caption_of: Returns a row's caption. Lone surrogates, which UTF-8 cannot encode, become question marks before
            `noun_phrases` reads it; the row is unchanged.
        minimum: Fewest captions of a phrase (the paper's 3).
        maximum: Most captions drawn for a phrase (the paper's 100).
        seed: Seeds the draws; the same rows, phrases and seed keep the same rows, whatever `batch_size` is.
        batch_size: Captions given to `noun_phrases` at a time.
        progress: Wraps the reading, for a progress bar.

    Returns:
        The report.

    Raises:
        UserError: If a number is below 1, a caption is not text or a row is not JSON; it names the row, from 1.
        OSError: If the disk is full (ENOSPC) or a file cannot be written.
    """
    for name, value in {"minimum": minimum, "maximum": maximum, "batch_size": batch_size}.items():
        if value < 1:
            raise UserError(f"{name} is {value}; it should be 1 or more")
    report = ConceptReport()
    with _full_disk_reported(), tempfile.TemporaryFile() as spool, closing(_Occurrences()) as occurrences:
        fates = bytearray()
        captions = _spooled(progress(rows), spool, caption_of)
        while batch := list(islice(captions, batch_size)):
            _tag(batch, noun_phrases, occurrences, fates)
        _judge(occurrences, fates, minimum, maximum, seed, report)
        kept = bytes(fate == _KEPT for fate in fates)
        report.rows, report.kept = len(fates), sum(kept)
        report.dropped.update({reason: count for fate, reason in REASONS.items() if (count := fates.count(fate))})
        after = occurrences.count([entry.phrase for entry in report.most_frequent], kept)
        report.most_frequent = [PhraseCount(e.phrase, e.before, after[e.phrase]) for e in report.most_frequent]
        spool.seek(0)
        for keep, line in zip(kept, spool, strict=True):
            if keep:
                write(json.loads(line))
    return report


def _spooled(rows: Iterable[Row], spool: IO[bytes], caption_of: Callable[[Row], str]) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        caption = caption_of(row)
        if not isinstance(caption, str):
            raise UserError(f"row {number}: its caption is {caption!r}; it should be text")
        try:
            line = json.dumps(dict(row))
        except (TypeError, ValueError) as error:
            raise UserError(f"row {number}: it is not JSON ({error}); leave such a field out") from None
        spool.write(line.encode("ascii") + b"\n")
        yield caption.encode("utf-8", "replace").decode("utf-8").strip()


def _tag(
    captions: list[str],
    noun_phrases: Callable[[Sequence[str]], Iterable[list[str]]],
    occurrences: _Occurrences,
    fates: bytearray,
) -> None:
    filled = [(index, caption) for index, caption in enumerate(captions, start=len(fates)) if caption]
    fates.extend(_NO_PHRASE if caption else _EMPTY for caption in captions)
    found = noun_phrases([caption for _, caption in filled])
    for (index, _), phrases in zip(filled, found, strict=True):
        if unique := {phrase for phrase in phrases if phrase}:
            fates[index] = _RARE
            occurrences.add(unique, index)


def _judge(
    occurrences: _Occurrences, fates: bytearray, minimum: int, maximum: int, seed: int, report: ConceptReport
) -> None:
    """Draw every phrase's captions; fill the report's counts of phrases, `after` left at 0."""
    top: list[tuple[int, str]] = []
    for phrase, group in groupby(occurrences.by_phrase(), key=itemgetter(0)):
        captions = map(itemgetter(1), group)
        first = list(islice(captions, minimum))
        count = len(first)
        report.phrases += 1
        if count < minimum:
            report.rare_phrases += 1
        else:
            # Also seeded by the phrase, so that its draw does not depend on the other phrases.
            count = _draw(chain(first, captions), maximum, Random(f"{seed} {phrase}"), fates)
            report.capped_phrases += count > maximum
        entry = (-count, phrase)
        if len(top) < MOST_FREQUENT or entry < top[-1]:
            top = sorted([*top, entry])[:MOST_FREQUENT]
    report.most_frequent = [PhraseCount(phrase, -negative, 0) for negative, phrase in top]


def _draw(captions: Iterable[int], maximum: int, random: Random, fates: bytearray) -> int:
    """Keep `maximum` captions, all subsets equally likely (Vitter 1985, algorithm R); return the number of captions."""
    drawn: list[int] = []
    count = 0
    for count, caption in enumerate(captions, start=1):
        if count <= maximum:
            drawn.append(caption)
            continue
        # Of Python's generator, only random() returns the same numbers in every version.
        place = int(random.random() * count)
        if place < maximum:
            drawn[place], caption = caption, drawn[place]
        fates[caption] = max(fates[caption], _CAPPED)
    for caption in drawn:
        fates[caption] = _KEPT
    return count


class _Occurrences:
    """The captions of each phrase, in a temporary database on disk."""

    def __init__(self) -> None:
        # An empty name creates a private file in TMPDIR, removed when the connection or the process ends.
        self._base = sqlite3.connect("")
        self._base.execute("PRAGMA journal_mode = OFF")
        self._base.execute("PRAGMA temp_store = FILE")
        self._base.execute("CREATE TABLE occurrences (phrase TEXT NOT NULL, caption INTEGER NOT NULL)")

    def add(self, phrases: Iterable[str], caption: int) -> None:
        self._base.executemany("INSERT INTO occurrences VALUES (?, ?)", [(phrase, caption) for phrase in phrases])

    def by_phrase(self) -> Iterator[tuple[str, int]]:
        return self._base.execute("SELECT phrase, caption FROM occurrences ORDER BY phrase, caption")

    def count(self, phrases: Sequence[str], kept: bytes) -> Counter[str]:
        """Count the kept captions of each phrase."""
        marks = ", ".join("?" * len(phrases))
        found = self._base.execute(f"SELECT phrase, caption FROM occurrences WHERE phrase IN ({marks})", phrases)
        counts: Counter[str] = Counter()
        for phrase, caption in found:
            counts[phrase] += kept[caption]
        return counts

    def close(self) -> None:
        self._base.close()


@contextmanager
def _full_disk_reported() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
