"""Checks of rows and images before training: errors and warnings about each row and source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_llava.data.checks.duplicates import duplicates, leaks, shared_images
from lora_llava.data.checks.findings import CheckedSource, CheckReport, Finding
from lora_llava.data.encoded import EncodedTable, answer_starts
from lora_llava.data.formats import IMAGE_NOT_READ, LEADING_ANSWER_CUT, OPEN_QUESTION_CUT, PLACEHOLDER_ADDED
from lora_llava.data.selection import Policy, text_tokens, tiles_advice

_NOTES = {
    PLACEHOLDER_ADDED: "the row has an image but its text no <image>; it is added as data.image_position says",
    LEADING_ANSWER_CUT: "the conversation starts with an answer, which is removed, as in LLaVA",
    OPEN_QUESTION_CUT: "the conversation ends with a question, which is removed",
}
_WIDTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_MOST_BINS = 16


def check_sources(
    sources: Sequence[CheckedSource],
    policies: Mapping[str, Policy],
    *,
    leaks_are_errors: bool = True,
    with_images: Container[str] = (),
) -> CheckReport:
    """Run all checks.

    Args:
        sources: The parts of the splits, training first; their tables with image tokens.
        policies: The policy of each split.
        leaks_are_errors: Whether a held-out row that is also trained on is an error. In a published split, which cannot
            be fixed here, it is a warning.
        with_images: Sources that should have images, by the recipe or by images beside them; without images they are
            errors. So is any source in which a column that is not read seems to name images.

    Returns:
        The report, with findings in the order of the rows.
    """
    report = CheckReport(rows=sum(len(source.rows) for source in sources))
    for source in sources:
        policy = policies[source.split]
        (report.errors if policy.on_bad_row == "error" else report.warnings).extend(_bad_rows(source, policy))
        errors, warnings = _overlong(source, policy)
        report.errors += errors
        report.warnings += warnings
        report.warnings += _repaired(source)
        errors, warnings = _images(source, policy)
        report.errors += errors
        report.warnings += warnings
    report.errors += whole_source_errors(sources, with_images)
    report.warnings += duplicates(sources)
    report.warnings += shared_images(sources)
    (report.errors if leaks_are_errors else report.warnings).extend(leaks(sources))
    for split in dict.fromkeys(source.split for source in sources):
        mine = [source for source in sources if source.split == split]
        report.splits[split] = _figures(mine, policies[split])
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
        sound = np.concatenate([source.sound_rows for source in mine])
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
        elsewhere = any(len(source.sound_rows) for source in sources if source.name == mine[0].name)
        if elsewhere and not any(len(source.sound_rows) for source in mine):
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


def _overlong(source: CheckedSource, policy: Policy) -> tuple[list[Finding], list[Finding]]:
    """Return errors and warnings about rows over the limit, by the recipe's policy."""
    lengths = source.table.lengths()[source.rows]
    long = np.flatnonzero(lengths > policy.max_length)
    starts = answer_starts(source.table, source.rows[long])
    errors, warnings = [], []
    for place, start in zip(long, starts, strict=True):
        row, length = int(source.rows[place]), int(lengths[place])
        message = f"it has {length:,} tokens, over data.max_length {policy.max_length:,}"
        advice = tiles_advice(source.table, row, policy.max_length)
        if policy.on_overlong == "drop":
            warnings.append(source.finding("overlong", row, message + advice, dropped=True))
        elif policy.on_overlong == "error":
            fix = "raise it, or set data.on_overlong to drop or truncate_answer"
            errors.append(source.finding("overlong", row, f"{message}; {fix}{advice}"))
        elif start >= policy.max_length:
            cut = (
                f"{message}, and its last answer starts at token {start:,}: nothing of it would be left; raise it, or "
            )
            errors.append(source.finding("overlong", row, f"{cut}set data.on_overlong to drop{advice}"))
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


def _figures(sources: Sequence[CheckedSource], policy: Policy) -> dict[str, Any]:
    """Return the statistics of a split: rows, tokens, trained tokens, and histograms of tokens of rows and images."""
    lengths = np.concatenate([source.table.lengths()[source.sound_rows] for source in sources])
    trained = sum(int(source.table.supervised[source.sound_rows].sum()) for source in sources)
    longest = int(lengths.max()) if len(lengths) else 0
    over = np.maximum(lengths - policy.max_length, 0)
    most, fitting = _fitting_tiles(sources, policy.max_length)
    return {
        "rows": int(sum(len(source.rows) for source in sources)),
        "sound_rows": len(lengths),
        "rows_with_images": int(sum((source.table.image_counts[source.sound_rows] > 0).sum() for source in sources)),
        "sources": {source.name: len(source.rows) for source in sources},
        "tokens": int(lengths.sum()),
        "trained_tokens": trained,
        "longest": longest,
        "over_limit_rows": int((over > 0).sum()),
        "over_limit_tokens": int(over.sum()),
        **({"over_limit_max_tiles": most, "over_limit_rows_that_fit": fitting} if most is not None else {}),
        "histogram": _histogram(lengths, "rows"),
    } | ({"image_tokens": _histogram(images, "images")} if len(images := _image_lengths(sources)) else {})


def _fitting_tiles(sources: Sequence[CheckedSource], max_length: int) -> tuple[int | None, int]:
    """Return the `model.max_tiles` with which rows over the limit fit, and how many; None if no row would."""
    long = [
        (source.table.tiled, source.table.images(int(row)), max_length - text_tokens(source.table, int(row)))
        for source in sources
        if source.table.tiled is not None
        for row in source.sound_rows[source.table.lengths()[source.sound_rows] > max_length]
    ]
    limits = [tiled.most_tiles(names, room) for tiled, names, room in long]
    most = min((limit for limit in limits if limit is not None), default=None)
    if most is None:
        return None, 0
    return most, sum(sum(tiled.with_most(most).tokens(names)) <= room for tiled, names, room in long)


def _image_lengths(sources: Sequence[CheckedSource]) -> np.ndarray:
    """Return the tokens of each image that can be read, if the model has tiles; those of several rows count once."""
    found = []
    for source in sources:
        if (tiled := source.table.tiled) is not None:
            names = dict.fromkeys(name for row in source.sound_rows for name in source.table.images(int(row)))
            found += tiled.tokens([name for name in names if any(tiled.sizes.get(name, ()))])
    return np.array(found, dtype=np.int64)


def _histogram(values: np.ndarray, counted: str) -> list[dict[str, Any]]:
    """Return how many values are in each of at most 16 bins of equal width, the first of which starts at 0."""
    most = int(values.max()) if len(values) else 0
    width = next((width for width in _WIDTHS if most < width * _MOST_BINS), most // _MOST_BINS + 1)
    places = Counter((values // width).tolist())
    return [
        {"from": place * width, "to": (place + 1) * width, counted: places.get(place, 0)}
        for place in range(most // width + 1)
    ]
