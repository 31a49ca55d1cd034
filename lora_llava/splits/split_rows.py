"""Build the splits of a recipe: select their encoded rows, inspect their images, and mix their sources."""

from __future__ import annotations

import hashlib
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation
from lora_llava.data.encoded import EncodedRows
from lora_llava.data.images.image_check import ImageFacts
from lora_llava.data.images.image_id import ImageId, ImageName, own_name, own_names
from lora_llava.data.images.image_sources import PixelLoader, Pixels, SplitImages, join_images
from lora_llava.data.images.tiling import TiledImages
from lora_llava.data.mixture import Share, epoch_counts, mixture
from lora_llava.data.selection import NOT_DRAWN, Policy, Report, account, select_rows, tiles_advice, without_bad_images
from lora_llava.data.sources import Source
from lora_llava.data.templates.spans import AnyTemplate
from lora_llava.model.families.image_counts import Sizes
from lora_llava.model.families.tower_families import image_tokens, tiling_of
from lora_llava.recipe import EvaluationSection, Recipe
from lora_llava.splits.encoded_sources import (
    OpenSplit,
    Progress,
    encode_splits,
    inspect_split,
    no_progress,
    open_sources,
)
from lora_llava.splits.seen_rows import SeenRows


@dataclass
class Split:
    """A split with its selected rows.

    Attributes:
        sources: The sources of the rows.
        images: Opens the images.
        load_pixels: Loads pixels for the model.
        rows: The selected rows, encoded.
        report: Counts of used and dropped rows.
        epochs: Returns the rows of an epoch, if the recipe mixes by weight or rows; None: every epoch has all rows.
        sealed: Whether reading the rows is an error now.
        digests: SHA-256 of each image's file by its name; empty if the images were not opened.
        pixels: Hash of each image's pixels by its name, see `ImageFacts.pixels`.
        sizes: Height and width of each image by its name, see `ImageFacts.size`.
    """

    sources: list[Source]
    images: SplitImages
    load_pixels: PixelLoader
    rows: EncodedRows
    report: Report
    epochs: Callable[[int], list[int]] | None = None
    sealed: bool = False
    digests: Mapping[ImageName, str] = field(default_factory=dict)
    pixels: Mapping[ImageName, str] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=dict)

    def read(self, indices: Iterable[int]) -> list[Conversation]:
        """Read the conversations of these rows from their sources again.

        Raises:
            RuntimeError: If the split is sealed.
        """
        if self.sealed:
            raise RuntimeError("test rows are read during training; only the evaluation before and after may read them")
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
        """Return a hash of the data and the selection of rows."""
        digest = hashlib.sha256("".join(source.fingerprint for source in self.sources).encode())
        digest.update(np.ascontiguousarray(self.rows.places).tobytes())
        return digest.hexdigest()

    def name_of(self, index: int) -> str:
        """Return a row's name for messages: its source, its id and its images."""
        names = ", ".join(map(self.images.label, self.rows.image_files(index)))
        return f"{self.source_of(index).name}: {self.rows.row_name(index)}" + (f" ({names})" if names else "")

    def source_of(self, index: int) -> Source:
        """Return the source of a row."""
        return self.sources[self.rows.places[index, 0]]


def over_positions(split: Split, config: LlavaConfig) -> str | None:
    """Return a remark on rows that are longer than the language model has positions; None if there are none.

    Only rows that are asked can be so long: those to train on have at most `data.max_length` tokens.
    """
    positions = int(config.text_config.max_position_embeddings)
    long = np.flatnonzero(split.rows.lengths > positions)
    if not len(long):
        return None
    first = int(long[0])
    advice = tiles_advice(*split.rows.table_row(first), positions)
    return (
        f"{len(long):,} of {len(split.rows):,} rows are longer than the language model's {positions:,} positions, "
        f"where its answers mean little; the first, {split.rows.row_name(first)}, has "
        f"{split.rows.lengths[first]:,} tokens; leave them out{advice}"
    )


@contextmanager
def sealed(split: Split | None) -> Iterator[None]:
    """Make reading the split's rows an error inside this context, so that training cannot see test rows."""
    if split is not None:
        split.sealed = True
    try:
        yield
    finally:
        if split is not None:
            split.sealed = False


def run_policy(recipe: Recipe, split: str) -> Policy:
    """Return the policy for a split's unusable rows."""
    data = recipe.data
    # A test row is evaluated, not trained on: its answer need not fit.
    limit = sys.maxsize if split == "test" else data.max_length
    return Policy(limit, data.on_overlong, data.on_bad_row, data.on_bad_image)


def with_image_tokens(split: OpenSplit, tokenizer: Any, config: LlavaConfig, sizes: Sizes) -> OpenSplit:
    """Return a split whose tables know the tokens of their images.

    Args:
        split: From `encode_splits`.
        tokenizer: The processor's tokenizer.
        config: The model's config.
        sizes: The sizes of the split's images; needed for a model with tiles only.
    """
    image_id, tiling = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER), tiling_of(config)
    tables = []
    for number, table in enumerate(split.tables):
        tokens: int | TiledImages = image_tokens(config)
        if tiling is not None:
            mine = (name for name in sizes if not isinstance(name, ImageId) or name.source == number)
            own: Sizes = {own_name(name): sizes[name] for name in mine}
            tokens = TiledImages(tiling, own)
        tables.append(table.with_image_tokens(image_id, tokens))
    return replace(split, tables=tables)


def _images_of(split: OpenSplit) -> list[ImageName]:
    """Return the images of all rows of a split, each once."""
    several = len(split.tables) > 1
    named = ((int(number), name) for number, row in split.places for name in split.tables[number].images(int(row)))
    return list(dict.fromkeys(ImageId(*each) if several else each[1] for each in named))


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
    """Select the rows of a split and inspect their images: for a model with tiles before the rows are selected.

    Args:
        recipe: The recipe.
        name: The split's name.
        split: From `encode_splits`.
        processor: The stock processor.
        config: The model's config.
        progress: Wraps the images.
        trusted: Whether to skip opening the images, whose sizes a model with tiles needs nevertheless.

    Returns:
        The split.

    Raises:
        UserError: If a row is refused, or no row is left.
    """
    data, limits = recipe.data, run_policy(recipe, name)
    facts: dict[ImageName, ImageFacts] = {}

    def inspected(names: list[ImageName]) -> dict[ImageName, ImageFacts]:
        new = [each for each in names if each not in facts]
        facts.update(inspect_split(split.sources, new, lambda found: progress(f"images of {name}", found)))
        return facts

    if tiling_of(config) is not None:
        inspected(_images_of(split))
    split = with_image_tokens(split, processor.tokenizer, config, {each: found.size for each, found in facts.items()})
    rows, report = select_rows(split.tables, split.places, limits)
    mixed = name == "train" and any(x.weight is not None or x.rows is not None for x in data.train_sources())
    usable, draw = rows, None
    if mixed:
        draw = _epochs(recipe, split, usable)
        drawn = _drawn(recipe, draw, len(usable))
        report.dropped[NOT_DRAWN] += len(usable) - len(drawn)
        rows = usable.take(drawn)
    if not trusted:
        rows = without_bad_images(rows, data.on_bad_image, report, inspected)
    report.dropped = +report.dropped
    account(rows, report)
    epochs = _among(rows, usable, draw) if draw is not None else None
    if len(split.sources) > 1:
        used = Counter(split.sources[rows.places[i, 0]].name for i in (epochs(0) if epochs else range(len(rows))))
        report.sources = {source.name: used[source.name] for source in split.sources}
    sizes = {each: found.size for each, found in facts.items()}
    pixels = Pixels(split.images, processor.image_processor, {each: size for each, size in sizes.items() if all(size)})
    return Split(
        split.sources,
        split.images,
        pixels,
        rows,
        report,
        epochs,
        digests={each: found.digest for each, found in facts.items()},
        pixels={each: found.pixels for each, found in facts.items()},
        sizes=sizes,
    )


def _members(places: np.ndarray, sources: int) -> list[list[int]]:
    return [np.flatnonzero(places[:, 0] == number).tolist() for number in range(sources)]


def _epochs(recipe: Recipe, split: OpenSplit, rows: EncodedRows) -> Callable[[int], list[int]]:
    """Return a function that draws the rows of each epoch of a mixture.

    Raises:
        UserError: If a source in the mixture has no rows.
    """
    sections = recipe.data.train_sources()
    members = _members(rows.places, len(sections))
    for source, mine in zip(split.sources, members, strict=True):
        if not mine:
            raise UserError(f"data.sources: {source.name} has no usable row; `lora-llava check` reports why")
    shares = [Share(s.name, x.weight, x.rows) for s, x in zip(split.sources, sections, strict=True)]
    counts = epoch_counts(shares, [len(mine) for mine in members], recipe.data.max_train_rows)
    return mixture(members, counts, recipe.seed)


def _drawn(recipe: Recipe, draw: Callable[[int], list[int]], count: int) -> list[int]:
    """Return the rows that the run's epochs draw; all rows if max_steps determines the number of epochs."""
    if recipe.training.max_steps is not None:
        return list(range(count))
    return sorted({row for epoch in range(math.ceil(recipe.training.epochs)) for row in draw(epoch)})


def _among(rows: EncodedRows, usable: EncodedRows, draw: Callable[[int], list[int]]) -> Callable[[int], list[int]]:
    """Convert a draw from all usable rows into a draw from those that remain."""
    places = {(int(table), int(row)): index for index, (table, row) in enumerate(rows.places)}
    index_of = [places.get((int(table), int(row))) for table, row in usable.places]
    return lambda epoch: [index for i in draw(epoch) if (index := index_of[i]) is not None]


def asked_split(splits: Container[str]) -> str | None:
    """Return the split that is evaluated: test, or validation if the recipe has no test split."""
    return next((name for name in ("test", "validation") if name in splits), None)


def read_held_out(
    recipe: Recipe,
    processor: Any,
    template: AnyTemplate,
    config: LlavaConfig,
    progress: Progress = no_progress,
    *,
    trusted: bool = False,
    seen: SeenRows | None = None,
) -> tuple[str, Split]:
    """Read the held-out rows that are evaluated, and only the data needed for them.

    Args:
        recipe: The recipe.
        processor: The stock processor.
        template: The conversation template.
        config: The model's config.
        progress: Wraps the rows and images that are read.
        trusted: Whether to skip opening the images.
        seen: See `encode_splits`.

    Returns:
        The split's name, and the split.

    Raises:
        UserError: If the recipe has no held-out rows, or its data is missing or malformed.
    """
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation or EvaluationSection()})
    science = recipe.data.format == "scienceqa"
    if (science and recipe.data.splits.test is None) or recipe.data.format == "captions":
        raise UserError("this recipe has no test split to evaluate; name another recipe with --recipe")
    own = "test" if science or recipe.data.test_source else "validation" if recipe.data.validation_source else None
    alone = own == "test" or (own == "validation" and not recipe.data.test_rows)
    sources = open_sources(recipe, [own]) if own is not None and alone else None
    splits = encode_splits(recipe, processor.tokenizer, template, progress, sources, seen)
    name = asked_split(splits)
    if name is None:
        raise UserError(
            "this recipe has no held-out rows to evaluate; set data.test_rows, or name another recipe with --recipe"
        )
    return name, build_split(recipe, name, splits[name], processor, config, progress, trusted=trusted)


def sample_rows(recipe: Recipe, split: str, count: int) -> tuple[list[Conversation], SplitImages, int]:
    """Sample rows of a split without encoding them.

    Args:
        recipe: The recipe.
        split: `train`, or another of `open_sources`.
        count: The largest number of rows, drawn by the seed over all sources.

    Returns:
        The rows, their images, and the total number of rows.

    Raises:
        UserError: If data cannot be read.
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
                row = replace(row, images=tuple(ImageId(number, name) for name in own_names(row.images)))
            total += 1
            place = total - 1 if total <= count else rng.randrange(total)
            if total <= count:
                kept.append(row)
            elif place < count:
                kept[place] = row
    return kept, join_images([source.images for source in sources]), total
