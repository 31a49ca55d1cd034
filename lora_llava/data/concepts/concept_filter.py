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
"""What becomes of a row; of several phrases' verdicts the highest holds."""
REASONS = {
    _EMPTY: "empty caption",
    _NO_PHRASE: "no noun phrase",
    _RARE: "rare phrases only",
    _CAPPED: "beyond the cap",
}


@dataclass(frozen=True)
class PhraseCount:
    """A phrase and the captions that hold it, among all rows and among those kept."""

    phrase: str
    before: int
    after: int


@dataclass
class ConceptReport:
    """What became of the rows.

    Attributes:
        rows: Rows read.
        kept: Rows written.
        dropped: Rows left out by reason, `REASONS`' values; with `kept` they add up to `rows`.
        phrases: Unique noun phrases.
        rare_phrases: Those of too few captions, skipped.
        capped_phrases: Those of more captions than were drawn.
        most_frequent: The most frequent phrases, those of one count in alphabetical order.
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

    Noun phrases of fewer than `minimum` captions are skipped. Of every other phrase the captions are taken, or
    `maximum` of them at random where it has more; a row is kept where one of its phrases took it. The paper adds
    phrases from the rarest on and draws out of all of a phrase's captions, whatever was added before, so that the
    order changes nothing and phrases come in alphabetical order here. A kept caption brings its other phrases along:
    one of those may still end with more than `maximum`.

    Rows and occurrences wait on the disk, in nameless files in `TMPDIR` that the system removes however the process
    ends; rows that are little more than a caption take about twice their own size there. In memory is one batch of
    captions, and two bytes per row.

    Args:
        rows: Read once, so it may be a generator over a pipe. Rows are kept as JSON until they are written.
        write: Gets the kept rows, in their old order, after all rows were read.
        noun_phrases: From captions to a list of phrases each, as `load_noun_phrases` gives; a phrase that comes
            twice in a caption counts once.
        caption_of: Gives a row's caption. Lone surrogates, which no file of UTF-8 can hold, become question marks
            before `noun_phrases` reads it; the row itself stays as it is.
        minimum: Fewest captions of a phrase (the paper's 3).
        maximum: Most captions drawn for a phrase (the paper's 100).
        seed: Draws; the same rows, phrases and seed keep the same rows, whatever `batch_size` is.
        batch_size: Captions given to `noun_phrases` at a time.
        progress: Wraps the reading, for a progress bar.

    Returns:
        The report.

    Raises:
        UserError: For a number below 1, a caption that is no text or a row that is not JSON; it names the row, from 1.
        OSError: Where the disk is full (ENOSPC) or a file cannot be written.
    """
    for name, value in {"minimum": minimum, "maximum": maximum, "batch_size": batch_size}.items():
        if value < 1:
            raise UserError(f"{name} is {value}; it should be 1 or more")
    report = ConceptReport()
    with _full_disk_told(), tempfile.TemporaryFile() as spool, closing(_Occurrences()) as occurrences:
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
            # Seeded by the phrase too, so that one phrase's draw does not hang on which others there are.
            count = _draw(chain(first, captions), maximum, Random(f"{seed} {phrase}"), fates)
            report.capped_phrases += count > maximum
        entry = (-count, phrase)
        if len(top) < MOST_FREQUENT or entry < top[-1]:
            top = sorted([*top, entry])[:MOST_FREQUENT]
    report.most_frequent = [PhraseCount(phrase, -negative, 0) for negative, phrase in top]


def _draw(captions: Iterable[int], maximum: int, random: Random, fates: bytearray) -> int:
    """Keep `maximum` captions, every subset as likely (Vitter 1985, algorithm R); returns how many there are."""
    drawn: list[int] = []
    count = 0
    for count, caption in enumerate(captions, start=1):
        if count <= maximum:
            drawn.append(caption)
            continue
        # Of Python's generator only random() gives the same numbers in every version.
        place = int(random.random() * count)
        if place < maximum:
            drawn[place], caption = caption, drawn[place]
        fates[caption] = max(fates[caption], _CAPPED)
    for caption in drawn:
        fates[caption] = _KEPT
    return count


class _Occurrences:
    """Which phrase is in which caption, in a temporary database on the disk."""

    def __init__(self) -> None:
        # No name makes a file of its own in TMPDIR, which is gone when the connection or the process ends.
        self._base = sqlite3.connect("")
        self._base.execute("PRAGMA journal_mode = OFF")
        self._base.execute("PRAGMA temp_store = FILE")
        self._base.execute("CREATE TABLE occurrences (phrase TEXT NOT NULL, caption INTEGER NOT NULL)")

    def add(self, phrases: Iterable[str], caption: int) -> None:
        self._base.executemany("INSERT INTO occurrences VALUES (?, ?)", [(phrase, caption) for phrase in phrases])

    def by_phrase(self) -> Iterator[tuple[str, int]]:
        return self._base.execute("SELECT phrase, caption FROM occurrences ORDER BY phrase, caption")

    def count(self, phrases: Sequence[str], kept: bytes) -> Counter[str]:
        """Kept captions of each phrase."""
        marks = ", ".join("?" * len(phrases))
        found = self._base.execute(f"SELECT phrase, caption FROM occurrences WHERE phrase IN ({marks})", phrases)
        counts: Counter[str] = Counter()
        for phrase, caption in found:
            counts[phrase] += kept[caption]
        return counts

    def close(self) -> None:
        self._base.close()


@contextmanager
def _full_disk_told() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
