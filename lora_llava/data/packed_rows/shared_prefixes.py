"""Rows that begin with the same tokens and images: in a packed row, such a prefix is computed once.

The rows of a group continue one prefix as branches:

    [BOS ... <image> x 576 | question 1, answer 1 | question 2, answer 2 | ...]

A causal model computes the same for a prefix whatever follows it, so this is exact.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lora_llava.data.encoded import EncodedRows
from lora_llava.data.images.image_id import ImageName


class Prefix(NamedTuple):
    """The beginning that a row shares with others.

    Attributes:
        group: Number of its group.
        tokens: Tokens of the prefix, image tokens included.
        images: Images of the prefix.
        tiles: Their tiles: one each for a model without tiles.
    """

    group: int
    tokens: int
    images: int
    tiles: int


@dataclass(frozen=True)
class SharedPrefixes:
    """The prefixes that rows share.

    Attributes:
        of: The prefix of each row; None for a row that shares none.
        other_text: Number of rows that share their images with another row, but not the text before the last of them.
    """

    of: Sequence[Prefix | None]
    other_text: int = 0

    def rows(self) -> int:
        """Return the number of rows that share a prefix with another row."""
        return sum(prefix is not None for prefix in self.of)

    def group(self, row: int) -> int | None:
        """Return the number of a row's group; None if it shares nothing."""
        prefix = self.of[row]
        return None if prefix is None else prefix.group

    def runs(self, rows: Sequence[int]) -> list[list[int]]:
        """Split packed rows into runs of neighbours that share a prefix; a row that shares none is a run."""
        found: list[list[int]] = []
        for row in rows:
            group = self.group(row)
            if found and group is not None and group == self.group(found[-1][-1]):
                found[-1].append(row)
            else:
                found.append([row])
        return found

    def tokens(self, rows: Sequence[int], lengths: Sequence[int]) -> int:
        """Return the tokens of rows that are packed in this order, each shared prefix counted once.

        Args:
            rows: Indices of the rows.
            lengths: Tokens of each row of the split.
        """
        return sum(lengths[i] for i in rows) - sum(count * prefix.tokens for prefix, count in self._repeats(rows))

    def tiles(self, rows: Sequence[int], counts: Sequence[int]) -> int:
        """Return the tiles of rows that are packed in this order, those of each shared prefix counted once."""
        return sum(counts[i] for i in rows) - sum(count * prefix.tiles for prefix, count in self._repeats(rows))

    def keys(self, rows: Sequence[int], lengths: Sequence[int]) -> int:
        """Return the keys that attention reads for rows in this order: each branch reads its prefix again."""
        return sum(lengths[i] for i in rows) + sum(prefix.tokens for prefix, _ in self._repeats(rows))

    def _repeats(self, rows: Sequence[int]) -> list[tuple[Prefix, int]]:
        """Return each shared prefix and how many times it is not repeated."""
        runs = [(self.of[run[0]], len(run) - 1) for run in self.runs(rows)]
        return [(prefix, count) for prefix, count in runs if prefix is not None and count]


def find_prefixes(rows: EncodedRows, pixels: Mapping[ImageName, str]) -> SharedPrefixes:
    """Find the rows that begin with the same tokens and images.

    A prefix ends behind the last image before the first answer.

    Args:
        rows: The rows of a split.
        pixels: Hash of each image's pixels, so that copies of an image under other names share it.

    Returns:
        The prefix of each row.
    """
    keys: list[tuple[bytes, tuple[str, ...]] | None] = []
    sizes: list[tuple[int, int, int]] = []
    for index in range(len(rows)):
        table, row = rows.table_row(index)
        ids, trained = table.row(row)
        places = np.flatnonzero(ids[: int(trained.argmax())] == table.image_id)
        images = tuple(pixels.get(name, "") for name in rows.image_files(index)[: len(places)])
        end = int(places[-1]) + 1 if len(places) else 0
        keys.append((ids[:end].tobytes(), images) if images and all(images) else None)
        count = len(places)
        tokens = end - count + int(table.image_tokens(row)[:count].sum())
        sizes.append((tokens, count, sum(table.tile_counts(row)[:count])))
    counts = Counter(keys)
    numbers: dict[Any, int] = defaultdict(lambda: len(numbers))
    of = [
        Prefix(numbers[key], *size) if key is not None and counts[key] > 1 else None
        for key, size in zip(keys, sizes, strict=True)
    ]
    users = Counter(key[1] for key in keys if key is not None)
    return SharedPrefixes(of, sum(key is not None and counts[key] == 1 and users[key[1]] > 1 for key in keys))


class SharedSamples(Sequence[Any]):
    """The rows of a split with the prefix of each, as `PackedCollator` reads it.

    Args:
        rows: The rows.
        shared: Their prefixes.
    """

    def __init__(self, rows: EncodedRows, shared: SharedPrefixes) -> None:
        self.rows, self.shared = rows, shared

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """Return a row with its `prefix`, or None."""
        return self.rows[index] | {"prefix": self.shared.of[index]}


class Segment(NamedTuple):
    """Consecutive tokens of a packed row: a sample, a shared prefix, or a branch.

    Attributes:
        sample: Index of its sample in the row; of a prefix, the first sample that has it.
        start: Its first token in that sample.
        end: The token behind its last one.
        first_image: Its first image in that sample.
        last_image: The image behind its last one.
        prefix: Index of the segment that it continues; None if it continues none.
    """

    sample: int
    start: int
    end: int
    first_image: int
    last_image: int
    prefix: int | None = None

    @property
    def tokens(self) -> int:
        return self.end - self.start


def segments_of(samples: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """Split packed samples into segments: neighbours of one group become their prefix and a branch each.

    Args:
        samples: With `input_ids`, `image_files`, and `prefix` if they may share one.

    Returns:
        The segments, in order.
    """
    groups = [getattr(sample.get("prefix"), "group", None) for sample in samples]
    found: list[Segment] = []
    prefix: int | None = None
    for place, sample in enumerate(samples):
        tokens, images = len(sample["input_ids"]), len(sample["image_files"])
        shared: Prefix | None = sample.get("prefix")
        before, after = groups[max(0, place - 1) : place], groups[place + 1 : place + 2]
        if shared is None or shared.group not in (*before, *after):
            found.append(Segment(place, 0, tokens, 0, images))
            continue
        if shared.group not in before:
            prefix = len(found)
            found.append(Segment(place, 0, shared.tokens, 0, shared.images))
        found.append(Segment(place, shared.tokens, tokens, shared.images, images, prefix))
    return found
