"""A recipe's data: sources opened and encoded, held-back rows drawn, and each split's rows picked from them."""

from __future__ import annotations

import hashlib
import math
import random
import sys
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlavaConfig

from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation
from lora_llava.data.encoded import EncodedRows, EncodedTable, encode_table
from lora_llava.data.formats import Columns
from lora_llava.data.images import ImageSource, JoinedImages, Pictures, Pixels
from lora_llava.data.mixture import Share, epoch_counts, hold_back, mixture, row_keys
from lora_llava.data.picture_check import Picture, inspect_pictures
from lora_llava.data.rows import Policy, Report, select_rows
from lora_llava.data.scienceqa import load_scienceqa
from lora_llava.data.sources import Read, Source, list_source, open_source
from lora_llava.data.templates import get_template
from lora_llava.demo.dataset import build_demo_captions, build_demo_scienceqa
from lora_llava.errors import UserError
from lora_llava.model.base import cache_folder
from lora_llava.recipe import EvaluationSection, Recipe, SourceSection

Progress = Callable[[str, Iterable[Any]], Iterable[Any]]
"""Wraps what is read or opened, with a word for what it is, for a progress bar."""


def no_progress(name: str, items: Iterable[Any]) -> Iterable[Any]:
    return items


@dataclass
class Split:
    """Rows of one split.

    Attributes:
        sources: Where they come from.
        images: Opens their pictures.
        pictures: Gives them to a model.
        rows: Those that are used, encoded.
        report: What became of all.
        epochs: Which rows an epoch has, where the recipe mixes by weight or rows; None: all of them.
    """

    sources: list[Source]
    images: ImageSource
    pictures: Pictures
    rows: EncodedRows
    report: Report
    epochs: Callable[[int], list[int]] | None = None

    def read(self, indices: Iterable[int]) -> list[Conversation]:
        """The conversations of these rows, read from their source again."""
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

    def source_of(self, index: int) -> Source:
        """Where a row comes from."""
        return self.sources[self.rows.places[index, 0]]


@dataclass
class OpenSplit:
    """A split before its rows are picked: sources, their tables and which rows of them belong to it."""

    sources: list[Source]
    tables: list[EncodedTable]
    places: np.ndarray

    @property
    def images(self) -> ImageSource:
        return self.sources[0].images if len(self.sources) == 1 else JoinedImages([s.images for s in self.sources])


def open_sources(recipe: Recipe, names: Sequence[str] | None = None) -> dict[str, list[Source]]:
    """Open what a recipe reads, split by split; the test split only where an evaluation asks for it.

    Args:
        recipe: The recipe.
        names: Only these splits.

    Returns:
        Sources by split: `train`, and `validation` and `test` where they have their own.

    Raises:
        UserError: For data that is missing or malformed, or a split that is empty.
    """
    data = recipe.data
    wanted: dict[str, tuple[SourceSection, ...]] = {"train": data.train_sources()}
    if data.format == "scienceqa":
        splits = {"validation": data.splits.validation, "test": data.splits.test}
        for name, split in splits.items():
            if split is not None and (name != "test" or recipe.evaluation is not None):
                wanted[name] = (wanted["train"][0].model_copy(update={"split": split}),)
        if recipe.evaluation is not None and data.splits.test is None:
            raise UserError("data.splits.test is null, but evaluation asks for it; name a split or drop evaluation")
    else:
        held = {"validation": data.validation_source, "test": data.test_source}
        wanted |= {name: (source,) for name, source in held.items() if source is not None}
    return {
        name: [_open(recipe, source, f"data.{'path' if data.sources is None else f'sources.{i}.path'}")
               for i, source in enumerate(sources)]
        for name, sources in wanted.items() if names is None or name in names
    }  # fmt: skip


def _open(recipe: Recipe, section: SourceSection, where: str) -> Source:
    data = recipe.data
    if section.format == "scienceqa":
        path: str | Path = build_demo_scienceqa(cache_folder()) if section.path == "demo" else section.path
        found = load_scienceqa(
            path, section.split, order=data.prompt_order, image_position=data.image_position, seed=recipe.seed,
            image_folder=section.image_folder, max_image_pixels=data.max_image_pixels, revision=section.revision,
        )  # fmt: skip
        name = section.name or f"{Path(section.path).name} {section.split}"
        return list_source(name, found.conversations, found.images)
    path = section.path
    if path == "demo" and section.format == "captions":
        path = build_demo_captions(cache_folder())
    return open_source(
        path, name=section.name, form=section.format, file=section.file, revision=section.revision,
        split=section.split, image_folder=section.image_folder, columns=Columns(**section.columns.model_dump()),
        position=data.image_position, seed=recipe.seed, max_image_pixels=data.max_image_pixels, where=where,
    )  # fmt: skip


def encode_splits(
    recipe: Recipe, tokenizer: Any, progress: Progress = no_progress, sources: dict[str, list[Source]] | None = None
) -> dict[str, OpenSplit]:  # fmt: skip
    """Encode a recipe's sources and tell which rows belong to which split.

    Args:
        recipe: The recipe.
        tokenizer: The processor's.
        progress: Wraps the rows of each source.
        sources: From `open_sources`, where they are open already.

    Returns:
        Splits by name, in the order train, validation, test.

    Raises:
        UserError: For data that cannot be read, or where nothing is left to train on.
    """
    template = get_template(recipe.data.template, recipe.data.system_prompt)
    splits: dict[str, OpenSplit] = {}
    for name, found in (sources or open_sources(recipe)).items():
        tables = []
        for source in found:
            label = name if len(found) == 1 else source.name

            def wrapped(rows: Iterable[Read], label: str = label) -> Iterable[Read]:
                return progress(f"encoding {label}", rows)

            tables.append(
                encode_table(source, tokenizer=tokenizer, template=template, cache=cache_folder(), progress=wrapped)
            )
        splits[name] = OpenSplit(found, tables, _all_places(tables))
    return _held_back(recipe, splits)


def _all_places(tables: Sequence[EncodedTable]) -> np.ndarray:
    return np.concatenate(
        [np.stack([np.full(len(t), i), np.arange(len(t))], axis=1) for i, t in enumerate(tables)]
    ).astype(np.int64)


def _held_back(recipe: Recipe, splits: dict[str, OpenSplit]) -> dict[str, OpenSplit]:
    """Move the rows that the recipe holds back out of training, then thin training out to `max_train_rows`."""
    data = recipe.data
    if "train" not in splits:
        return splits
    train = splits["train"]
    # Asked or not, test rows are held back: a later evaluation of the same recipe asks them.
    counts = {name: count for name, count in (("validation", data.validation_rows), ("test", data.test_rows)) if count}
    if counts:
        keys = [
            key for number, (source, table) in enumerate(zip(train.sources, train.tables, strict=True))
            for key in row_keys(table, source.images, number)
        ]  # fmt: skip
        fields = [f"data.{name}_rows" for name in counts]
        left, *parts = hold_back(keys, list(counts.values()), recipe.seed, fields)
        for name, part in zip(counts, parts, strict=True):
            if name == "test" and recipe.evaluation is None:
                continue
            splits[name] = OpenSplit(train.sources, train.tables, train.places[part])
        train = splits["train"] = OpenSplit(train.sources, train.tables, train.places[left])
    if data.max_train_rows is not None and not _is_weighted(recipe):
        total = len(train.places)
        chosen = random.Random(recipe.seed).sample(range(total), min(data.max_train_rows, total))
        splits["train"] = OpenSplit(train.sources, train.tables, train.places[sorted(chosen)])
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def _is_weighted(recipe: Recipe) -> bool:
    return any(source.weight is not None for source in recipe.data.train_sources())


def run_policy(recipe: Recipe, split: str) -> Policy:
    """What becomes of a split's rows that cannot be used as they are."""
    data = recipe.data
    # A test row is asked, not trained on: its answer need not fit.
    limit = sys.maxsize if split == "test" else data.max_length
    return Policy(limit, data.on_overlong, data.on_bad_row, data.on_bad_image)


def build_split(
    recipe: Recipe, name: str, split: OpenSplit, processor: Any, config: LlavaConfig, progress: Progress = no_progress,
    *, trusted: bool = False,
) -> Split:  # fmt: skip
    """Pick the rows that a split uses, its pictures opened.

    Args:
        recipe: The recipe.
        name: The split's.
        split: From `encode_splits`.
        processor: The stock processor.
        config: Of the LLaVA.
        progress: Wraps the pictures.
        trusted: Leave the pictures unopened.

    Returns:
        The split.

    Raises:
        UserError: Naming the first row that is refused; or where no row is left.
    """

    def inspect(images: ImageSource, names: Iterable[str]) -> dict[str, Picture]:
        return inspect_pictures(
            images, names, picture_cache(split.sources), lambda found: progress(f"pictures of {name}", found)
        )

    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    places, counts = split.places, None
    if name == "train":
        places, counts = _mixed_places(recipe, split)
    rows, report = select_rows(
        split.tables, places, run_policy(recipe, name), image_id=image_id, num_image_tokens=config.image_seq_length,
        images=None if trusted else split.images, inspect=inspect,
    )  # fmt: skip
    epochs = None
    if counts is not None:
        epochs = mixture(_members(rows.places, len(counts)), counts, recipe.seed)
        report.sources = {s.name: n for s, n in zip(split.sources, counts, strict=True)}
    elif len(split.sources) > 1:
        counts = [len(mine) for mine in _members(rows.places, len(split.sources))]
        report.sources = {s.name: n for s, n in zip(split.sources, counts, strict=True)}
    return Split(split.sources, split.images, Pixels(split.images, processor.image_processor), rows, report, epochs)


def _members(places: np.ndarray, sources: int) -> list[list[int]]:
    return [np.flatnonzero(places[:, 0] == number).tolist() for number in range(sources)]


def _mixed_places(recipe: Recipe, split: OpenSplit) -> tuple[np.ndarray, list[int] | None]:
    """The rows that a mixture's epochs draw, and how many an epoch has of each source; None where it has all."""
    sections = recipe.data.train_sources()
    if all(section.weight is None and section.rows is None for section in sections):
        return split.places, None
    shares = [Share(s.name, x.weight, x.rows) for s, x in zip(split.sources, sections, strict=True)]
    members = _members(split.places, len(shares))
    counts = epoch_counts(shares, [len(mine) for mine in members], recipe.data.max_train_rows)
    if recipe.training.max_steps is not None:
        return split.places, counts
    draw = mixture(members, counts, recipe.seed)
    drawn = sorted({row for epoch in range(math.ceil(recipe.training.epochs)) for row in draw(epoch)})
    return split.places[drawn], counts


def picture_cache(sources: Sequence[Source]) -> Path:
    """The file that keeps what is known of these sources' pictures."""
    roots = "-".join(sorted({str(getattr(source.images, "root", source.fingerprint)) for source in sources}))
    return cache_folder() / "pictures" / f"{hashlib.sha256(roots.encode()).hexdigest()[:32]}.json"


def asked_split(splits: Container[str]) -> str | None:
    """Which split the tables ask: test, or validation where there is none."""
    return next((name for name in ("test", "validation") if name in splits), None)


def read_held_out(recipe: Recipe, processor: Any, config: LlavaConfig, progress: Progress = no_progress) -> Split:
    """Read the rows that the tables ask, and nothing that is not needed for it.

    Args:
        recipe: The recipe.
        processor: The stock processor.
        config: Of the LLaVA.
        progress: Wraps what is read and opened.

    Returns:
        The split.

    Raises:
        UserError: Where the recipe holds nothing back, or its data is missing or malformed.
    """
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation or EvaluationSection()})
    science = recipe.data.format == "scienceqa"
    if (science and recipe.data.splits.test is None) or recipe.data.format == "captions":
        raise UserError("this recipe has no test split to ask; name one that has with --recipe")
    sources = open_sources(recipe, ["test"]) if science else None
    splits = encode_splits(recipe, processor.tokenizer, progress, sources)
    name = asked_split(splits)
    if name is None:
        raise UserError("this recipe holds no rows back to ask; set data.test_rows, or name another with --recipe")
    return build_split(recipe, name, splits[name], processor, config, progress)


def sample_rows(recipe: Recipe, split: str, count: int) -> tuple[list[Conversation], ImageSource, int]:
    """Read some rows of a split without encoding any.

    Args:
        recipe: The recipe.
        split: `train`, or another of `open_sources`.
        count: How many at most, drawn by the seed over all sources.

    Returns:
        The rows, their pictures, and how many rows there are in all.

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
