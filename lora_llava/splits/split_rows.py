"""Each split's rows, picked from what was encoded, their images looked at, and mixtures laid out."""

from __future__ import annotations

import hashlib
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation
from lora_llava.data.encoded import EncodedRows
from lora_llava.data.images.image_check import ImageFacts
from lora_llava.data.images.reading import ImageSource, JoinedImages, PixelLoader, Pixels
from lora_llava.data.mixture import Share, epoch_counts, mixture
from lora_llava.data.selection import NOT_DRAWN, Policy, Report, account, select_rows, without_bad_images
from lora_llava.data.sources import Source
from lora_llava.recipe import EvaluationSection, Recipe
from lora_llava.splits.encoded_sources import (
    OpenSplit,
    Progress,
    encode_splits,
    inspect_split,
    no_progress,
    open_sources,
)


@dataclass
class Split:
    """Rows of one split.

    Attributes:
        sources: Where they come from.
        images: Opens their images.
        load_pixels: Loads their pixels for a model.
        rows: Those that are used, encoded.
        report: What became of all.
        epochs: Which rows an epoch has, where the recipe mixes by weight or rows; None: all of them.
        sealed: Whether its rows may not be read now.
        digests: SHA-256 of each image's file by its name; empty where the images were not opened.
    """

    sources: list[Source]
    images: ImageSource
    load_pixels: PixelLoader
    rows: EncodedRows
    report: Report
    epochs: Callable[[int], list[int]] | None = None
    sealed: bool = False
    digests: Mapping[str, str] = field(default_factory=dict)

    def read(self, indices: Iterable[int]) -> list[Conversation]:
        """The conversations of these rows, read from their source again.

        Raises:
            RuntimeError: While the split is sealed.
        """
        if self.sealed:
            raise RuntimeError("test rows are read while training runs; only the tables before and after may ask them")
        indices = list(indices)
        places = self.rows.places[indices] if indices else np.zeros((0, 2), dtype=np.int64)
        found: dict[tuple[int, int], Conversation] = {}
        for number, source in enumerate(self.sources):
            mine = [int(row) for table, row in places if table == number]
            found |= {(number, row): each for row, each in zip(mine, source.pick(mine), strict=True)}
        conversations = [found[int(table), int(row)] for table, row in places]
        return [
            replace(row, images=tuple(self.rows.image_files(i)), extra={**row.extra, "source": self.source_of(i).name})
            for i, row in zip(indices, conversations, strict=True)
        ]

    def fingerprint(self) -> str:
        """Hash over which rows of which data these are."""
        digest = hashlib.sha256("".join(source.fingerprint for source in self.sources).encode())
        digest.update(np.ascontiguousarray(self.rows.places).tobytes())
        return digest.hexdigest()

    def name_of(self, index: int) -> str:
        """A row for a person: its source, its id and its images."""
        names = ", ".join(map(self.images.label, self.rows.image_files(index)))
        return f"{self.source_of(index).name}: {self.rows.row_name(index)}" + (f" ({names})" if names else "")

    def source_of(self, index: int) -> Source:
        """Where a row comes from."""
        return self.sources[self.rows.places[index, 0]]


@contextmanager
def sealed(split: Split | None) -> Iterator[None]:
    """While this is entered, reading the split's rows is an error: what training sees of a test is no test any more."""
    if split is not None:
        split.sealed = True
    try:
        yield
    finally:
        if split is not None:
            split.sealed = False


def run_policy(recipe: Recipe, split: str) -> Policy:
    """What becomes of a split's rows that cannot be used as they are."""
    data = recipe.data
    # A test row is asked, not trained on: its answer need not fit.
    limit = sys.maxsize if split == "test" else data.max_length
    return Policy(limit, data.on_overlong, data.on_bad_row, data.on_bad_image)


def build_split(
    recipe: Recipe,
    name: str,
    split: OpenSplit,
    processor: Any,
    config: LlavaConfig,
    progress: Progress = no_progress,
    *,
    trusted: bool = False,
) -> Split:
    """Pick the rows that a split uses, its images opened.

    Args:
        recipe: The recipe.
        name: The split's.
        split: From `encode_splits`.
        processor: The stock processor.
        config: Of the LLaVA.
        progress: Wraps the images.
        trusted: Leave the images unopened.

    Returns:
        The split.

    Raises:
        UserError: Naming the first row that is refused; or where no row is left.
    """
    data, limits = recipe.data, run_policy(recipe, name)
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    rows, report = select_rows(
        split.tables, split.places, limits, image_id=image_id, num_image_tokens=config.image_seq_length
    )
    mixed = name == "train" and any(x.weight is not None or x.rows is not None for x in data.train_sources())
    usable, draw = rows, None
    if mixed:
        draw = _epochs(recipe, split, usable)
        drawn = _drawn(recipe, draw, len(usable))
        report.dropped[NOT_DRAWN] += len(usable) - len(drawn)
        rows = usable.take(drawn)
    digests: dict[str, str] = {}
    if not trusted:
        inspect = partial(inspect_split, split.sources, progress=lambda found: progress(f"images of {name}", found))

        def inspected(names: list[str]) -> dict[str, ImageFacts]:
            found = inspect(names)
            digests.update((name, image.digest) for name, image in found.items())
            return found

        rows = without_bad_images(rows, data.on_bad_image, report, inspected)
    report.dropped = +report.dropped
    account(rows, report)
    epochs = _among(rows, usable, draw) if draw is not None else None
    if len(split.sources) > 1:
        used = Counter(split.sources[rows.places[i, 0]].name for i in (epochs(0) if epochs else range(len(rows))))
        report.sources = {source.name: used[source.name] for source in split.sources}
    pixels = Pixels(split.images, processor.image_processor)
    return Split(split.sources, split.images, pixels, rows, report, epochs, digests=digests)


def _members(places: np.ndarray, sources: int) -> list[list[int]]:
    return [np.flatnonzero(places[:, 0] == number).tolist() for number in range(sources)]


def _epochs(recipe: Recipe, split: OpenSplit, rows: EncodedRows) -> Callable[[int], list[int]]:
    """Which of the rows each epoch of a mixture has.

    Raises:
        UserError: For a source that has a share in it and no row.
    """
    sections = recipe.data.train_sources()
    members = _members(rows.places, len(sections))
    for source, mine in zip(split.sources, members, strict=True):
        if not mine:
            raise UserError(f"data.sources: {source.name} has no row that can be used; `lora-llava check` says why")
    shares = [Share(s.name, x.weight, x.rows) for s, x in zip(split.sources, sections, strict=True)]
    counts = epoch_counts(shares, [len(mine) for mine in members], recipe.data.max_train_rows)
    return mixture(members, counts, recipe.seed)


def _drawn(recipe: Recipe, draw: Callable[[int], list[int]], count: int) -> list[int]:
    """The rows that the run's epochs draw; all, where a number of steps says how many epochs there are."""
    if recipe.training.max_steps is not None:
        return list(range(count))
    return sorted({row for epoch in range(math.ceil(recipe.training.epochs)) for row in draw(epoch)})


def _among(rows: EncodedRows, usable: EncodedRows, draw: Callable[[int], list[int]]) -> Callable[[int], list[int]]:
    """The draw from all usable rows as a draw from those that are left of them."""
    places = {(int(table), int(row)): index for index, (table, row) in enumerate(rows.places)}
    index_of = [places.get((int(table), int(row))) for table, row in usable.places]
    return lambda epoch: [index for i in draw(epoch) if (index := index_of[i]) is not None]


def asked_split(splits: Container[str]) -> str | None:
    """Which split the tables ask: test, or validation where there is none."""
    return next((name for name in ("test", "validation") if name in splits), None)


def read_held_out(
    recipe: Recipe, processor: Any, config: LlavaConfig, progress: Progress = no_progress, *, trusted: bool = False
) -> tuple[str, Split]:
    """Read the rows that the tables ask, and nothing that is not needed for it.

    Args:
        recipe: The recipe.
        processor: The stock processor.
        config: Of the LLaVA.
        progress: Wraps what is read and opened.
        trusted: Leave the images unopened.

    Returns:
        The split's name, and the split.

    Raises:
        UserError: Where the recipe holds nothing back, or its data is missing or malformed.
    """
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation or EvaluationSection()})
    science = recipe.data.format == "scienceqa"
    if (science and recipe.data.splits.test is None) or recipe.data.format == "captions":
        raise UserError("this recipe has no test split to ask; name one that has with --recipe")
    own = "test" if science or recipe.data.test_source else "validation" if recipe.data.validation_source else None
    alone = own == "test" or (own == "validation" and not recipe.data.test_rows)
    sources = open_sources(recipe, [own]) if own is not None and alone else None
    splits = encode_splits(recipe, processor.tokenizer, progress, sources)
    name = asked_split(splits)
    if name is None:
        raise UserError("this recipe holds no rows back to ask; set data.test_rows, or name another with --recipe")
    return name, build_split(recipe, name, splits[name], processor, config, progress, trusted=trusted)


def sample_rows(recipe: Recipe, split: str, count: int) -> tuple[list[Conversation], ImageSource, int]:
    """Read some rows of a split without encoding any.

    Args:
        recipe: The recipe.
        split: `train`, or another of `open_sources`.
        count: How many at most, drawn by the seed over all sources.

    Returns:
        The rows, their images, and how many rows there are in all.

    Raises:
        UserError: For data that cannot be read.
    """
    sources = open_sources(recipe, [split])[split]
    rng = random.Random(recipe.seed)
    kept: list[Conversation] = []
    total = 0
    for number, source in enumerate(sources):
        for row in source.read():
            if not isinstance(row, Conversation):
                continue
            if len(sources) > 1:
                row = replace(row, images=tuple(f"{number}|{name}" for name in row.images))
            total += 1
            place = total - 1 if total <= count else rng.randrange(total)
            if total <= count:
                kept.append(row)
            elif place < count:
                kept[place] = row
    images = sources[0].images if len(sources) == 1 else JoinedImages([source.images for source in sources])
    return kept, images, total
