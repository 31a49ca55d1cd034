"""Duplicate rows, and held-out rows and images that are also trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from lora_llava.data.checks.findings import CheckedSource, Finding

LEAK, SHARED = "held-out row in train", "held-out image in train"
DUPLICATE = "duplicate row"


def _key(source: CheckedSource, row: int, question_only: bool) -> bytes:
    """Return a hash of a row's text, or only its question, and of its images' contents."""
    ids, trained = source.table.row(row)
    digest = hashlib.sha256((ids[~trained] if question_only else ids).tobytes())
    for name in source.table.images(row):
        image = source.images.get(name)
        digest.update((image.digest if image and image.digest else name).encode("utf-8", "surrogatepass"))
    return digest.digest()[:16]


def duplicates(sources: Sequence[CheckedSource]) -> Iterator[Finding]:
    first: dict[tuple[str, bytes], tuple[CheckedSource, int]] = {}
    for source in sources:
        for row in map(int, source.sound_rows):
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
        for row in map(int, source.sound_rows):
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
        for row in map(int, source.sound_rows):
            held_out.setdefault(_key(source, row, True), (source, row))
    for source in (source for source in sources if source.split == "train"):
        for row in map(int, source.sound_rows):
            found = held_out.get(_key(source, row, True))
            if found is not None:
                other, number = found
                yield source.finding(
                    LEAK,
                    row,
                    f"it has the question and images of {other.split} {other.table.row_name(number)}; remove it "
                    "from one of them",
                )


def shared_images(sources: Sequence[CheckedSource]) -> Iterator[Finding]:
    """Find training rows with an image of a held-out row, under any name."""
    held_out: dict[str, str] = {}
    for source in (source for source in sources if source.split != "train"):
        for row in map(int, source.sound_rows):
            for digest in _digests(source, row):
                held_out.setdefault(digest, f"{source.split} {source.table.row_name(row)}")
    for source in (source for source in sources if source.split == "train"):
        for row in map(int, source.sound_rows):
            found = next((held_out[digest] for digest in _digests(source, row) if digest in held_out), None)
            if found is not None:
                yield source.finding(SHARED, row, f"it has an image of {found}")


def _digests(source: CheckedSource, row: int) -> list[str]:
    images = (source.images.get(name) for name in source.table.images(row))
    return [image.digest for image in images if image is not None and image.digest]
