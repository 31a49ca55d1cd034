"""Open and encode a recipe's sources, and assign their rows to splits."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.core.storage import cache_folder
from lora_llava.data.encoded import EncodedTable, encode_table
from lora_llava.data.formats import Columns
from lora_llava.data.images.image_check import ImageFacts, inspect_images
from lora_llava.data.images.image_id import ImageId, ImageName, own_names
from lora_llava.data.images.image_sources import FolderImages, SplitImages, TableImages, join_images
from lora_llava.data.scienceqa import load_scienceqa
from lora_llava.data.sources import Read, Source, list_source, open_source
from lora_llava.data.templates.spans import AnyTemplate
from lora_llava.demo.dataset import build_demo_captions, build_demo_scienceqa, build_demo_small
from lora_llava.recipe import Recipe, SourceSection
from lora_llava.splits.continued_split import assign_rows, keep_untrained
from lora_llava.splits.hold_out import hold_back, row_keys
from lora_llava.splits.seen_rows import HELD_OUT, RowContent, SeenRows, row_content

Progress = Callable[[str, Iterable[Any]], Iterable[Any]]
"""Wraps items that are read or opened, with a label, for a progress bar."""


def no_progress(name: str, items: Iterable[Any]) -> Iterable[Any]:
    return items


def show_progress(name: str, items: Iterable[Any]) -> Iterable[Any]:
    """A `Progress` that shows a bar and removes it at the end."""
    return progress_bar(items, desc=name, leave=False)


@dataclass
class OpenSplit:
    """A split before its rows are selected: its sources, their tables, and the places of its rows."""

    sources: list[Source]
    tables: list[EncodedTable]
    places: np.ndarray
    notes: tuple[str, ...] = ()
    """Lines about rows whose side is that of an earlier run."""

    @property
    def images(self) -> SplitImages:
        return join_images([source.images for source in self.sources])


def open_sources(recipe: Recipe, names: Sequence[str] | None = None) -> dict[str, list[Source]]:
    """Open a recipe's sources by split; the test split only if the recipe has an evaluation.

    Args:
        recipe: The recipe.
        names: The splits to open; None opens all.

    Returns:
        Sources by split: `train`, and `validation` and `test` if they have separate sources.

    Raises:
        UserError: If data is missing or malformed, or a split is empty.
    """
    data = recipe.data
    wanted: dict[str, tuple[SourceSection, ...]] = {"train": data.train_sources()}
    if data.format == "scienceqa":
        splits = {"validation": data.splits.validation, "test": data.splits.test}
        for name, split in splits.items():
            if split is not None and (name != "test" or recipe.evaluation is not None):
                wanted[name] = (wanted["train"][0].model_copy(update={"split": split}),)
        if recipe.evaluation is not None and data.splits.test is None:
            raise UserError("data.splits.test is null, but evaluation needs it; name a split or drop evaluation")
    else:
        held_out = {"validation": data.validation_source, "test": data.test_source}
        wanted |= {name: (source,) for name, source in held_out.items() if source is not None}
    return _with_unique_names(
        {
            name: [_open(recipe, source, _field(recipe, name, i)) for i, source in enumerate(sources)]
            for name, sources in wanted.items()
            if names is None or name in names
        }
    )


def _field(recipe: Recipe, split: str, place: int) -> str:
    """Return the recipe field of a source's path."""
    if split != "train" and recipe.data.format != "scienceqa":
        return f"data.{split}_source.path"
    return "data.path" if recipe.data.sources is None else f"data.sources.{place}.path"


def _with_unique_names(splits: dict[str, list[Source]]) -> dict[str, list[Source]]:
    """Number sources of the same name, such as two files called train.json."""
    seen: Counter[str] = Counter()

    def named(source: Source) -> Source:
        seen[source.name] += 1
        again = f"{source.name} ({seen[source.name]})"
        return replace(source, name=again) if seen[source.name] > 1 else source

    return {name: [named(source) for source in sources] for name, sources in splits.items()}


def _open(recipe: Recipe, section: SourceSection, where: str) -> Source:
    data = recipe.data
    if section.format == "scienceqa":
        path: str | Path = build_demo_scienceqa(cache_folder()) if section.path == "demo" else section.path
        found = load_scienceqa(
            path,
            section.split,
            order=data.prompt_order,
            image_position=data.image_position,
            seed=recipe.seed,
            image_folder=section.image_folder,
            max_image_pixels=data.max_image_pixels,
            revision=section.revision,
            background=data.background,
            follow_links=data.follow_links,
        )
        name = section.name or f"{Path(section.path).name} {section.split}"
        return list_source(name, found.conversations, found.images)
    path = section.path
    if path == "demo" and section.format == "captions":
        path = build_demo_captions(cache_folder())
    if path == "demo_small" and section.format == "conversations":
        try:
            path = build_demo_small(cache_folder(), section.split)
        except UserError as error:
            raise UserError(f"{where.removesuffix('.path')}.split: {error}") from None
    return open_source(
        path,
        name=section.name,
        form=section.format,
        file=section.file,
        revision=section.revision,
        split=section.split,
        image_folder=section.image_folder,
        columns=Columns(**section.columns.model_dump()),
        position=data.image_position,
        seed=recipe.seed,
        max_image_pixels=data.max_image_pixels,
        where=where,
        background=data.background,
        follow_links=data.follow_links,
    )


def encode_splits(
    recipe: Recipe,
    tokenizer: Any,
    template: AnyTemplate,
    progress: Progress = no_progress,
    sources: dict[str, list[Source]] | None = None,
    seen: SeenRows | None = None,
) -> dict[str, OpenSplit]:
    """Encode a recipe's sources and assign their rows to splits.

    Args:
        recipe: The recipe.
        tokenizer: The processor's tokenizer.
        template: The conversation template.
        progress: Wraps the rows of each source.
        sources: The result of `open_sources`; None opens the sources.
        seen: The rows of the runs that the recipe continues, from `earlier_rows`; None if it continues none.

    Returns:
        Splits by name, in the order train, validation, test.

    Raises:
        UserError: If data cannot be read, or no rows are left to train on.
    """
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
    if seen is not None:
        return _reduced(recipe, continue_splits(recipe, splits, seen, progress))
    return _reduced(recipe, _hold_out(recipe, splits))


def _all_places(tables: Sequence[EncodedTable]) -> np.ndarray:
    return np.concatenate(
        [np.stack([np.full(len(t), i), np.arange(len(t))], axis=1) for i, t in enumerate(tables)]
    ).astype(np.int64)


def _hold_out(recipe: Recipe, splits: dict[str, OpenSplit]) -> dict[str, OpenSplit]:
    """Move the held-out rows out of training."""
    counts = held_out_counts(recipe)
    if "train" not in splits or not counts:
        return splits
    train = splits["train"]
    keys = [key for mine in source_keys(train) for key in mine]
    fields = [f"data.{name}_rows" for name in counts]
    left, *parts = hold_back(keys, list(counts.values()), recipe.seed, fields)
    for name, part in zip(counts, parts, strict=True):
        if name == "test" and recipe.evaluation is None:
            continue
        splits[name] = OpenSplit(train.sources, train.tables, train.places[part])
    splits["train"] = OpenSplit(train.sources, train.tables, train.places[left])
    return splits


def held_out_counts(recipe: Recipe) -> dict[str, int]:
    """Return the number of rows that a recipe holds out of its training rows, by split.

    Test rows are held out even without an evaluation: a later evaluation of the recipe uses them.
    """
    data = recipe.data
    return {name: count for name, count in (("validation", data.validation_rows), ("test", data.test_rows)) if count}


def source_keys(split: OpenSplit) -> list[list[list[Hashable]]]:
    """Return the keys of the rows of each source, from `row_keys`."""
    return [
        row_keys(table, source.images, number, _digests(source, table))
        for number, (source, table) in enumerate(zip(split.sources, split.tables, strict=True))
    ]


def continue_splits(
    recipe: Recipe, splits: dict[str, OpenSplit], seen: SeenRows, progress: Progress
) -> dict[str, OpenSplit]:
    """Assign the rows of a recipe that continues a run, so that no row changes sides."""
    notes: list[str] = []
    for name in HELD_OUT:
        if name in splits:
            split, field = splits[name], f"data.{name}_source"
            kept, lines = keep_untrained(_contents(split, progress), name, seen, field)
            notes += lines
            splits[name] = replace(split, places=split.places[kept])
    if "train" not in splits:
        return splits
    train, sourced = splits["train"], tuple(splits)
    if recipe.data.format == "scienceqa":
        sourced = HELD_OUT
    names = [key for mine in source_keys(train) for key in mine]
    counts = held_out_counts(recipe)
    found = assign_rows(_contents(train, progress), names, counts, recipe.seed, seen, sourced)
    for name, part in found.parts.items():
        if name == "validation" or recipe.evaluation is not None:
            splits[name] = replace(train, places=train.places[part])
    splits["train"] = replace(train, places=train.places[found.train], notes=(*found.notes, *notes))
    return splits


def _contents(split: OpenSplit, progress: Progress) -> list[RowContent]:
    """Return the content of all rows of a split's sources, whose images are opened."""
    found = []
    for source, table in zip(split.sources, split.tables, strict=True):
        names = dict.fromkeys(name for row in range(len(table)) for name in table.images(row))
        bar = partial(progress, f"images of {source.name}")
        facts = inspect_images(source.images, names, image_cache(source), bar)
        found += [
            row_content(table, row, [facts[name].pixels for name in table.images(row)]) for row in range(len(table))
        ]
    return found


def _reduced(recipe: Recipe, splits: dict[str, OpenSplit]) -> dict[str, OpenSplit]:
    """Reduce training to `max_train_rows`, and put the splits in order."""
    data = recipe.data
    if "train" in splits and data.max_train_rows is not None and not _is_weighted(recipe):
        train = splits["train"]
        total = len(train.places)
        chosen = random.Random(recipe.seed).sample(range(total), min(data.max_train_rows, total))
        splits["train"] = replace(train, places=train.places[sorted(chosen)])
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def _digests(source: Source, table: EncodedTable) -> dict[str, str] | None:
    """Return the hashes of images in a table, where equal images have different names; None for files."""
    if not isinstance(source.images, TableImages):
        return None
    names = list(dict.fromkeys(name for row in range(len(table)) for name in table.images(row)))
    found = inspect_images(source.images, names, image_cache(source))
    return {name: image.digest for name, image in found.items() if image.digest}


def _is_weighted(recipe: Recipe) -> bool:
    return any(source.weight is not None for source in recipe.data.train_sources())


def inspect_split(
    sources: Sequence[Source],
    names: Sequence[ImageName],
    progress: Callable[[Iterable[ImageFacts]], Iterable[ImageFacts]] = lambda found: found,
) -> dict[ImageName, ImageFacts]:
    """Inspect images source by source, so that the cache of a source serves every mixture.

    Args:
        sources: The sources of the split.
        names: The images, as `EncodedRows.image_files` names them.
        progress: Wraps the images of each source.

    Returns:
        The facts about the images, by name.
    """
    if len(sources) == 1:
        facts = inspect_images(sources[0].images, own_names(names), image_cache(sources[0]), progress)
        return dict(facts.items())
    found: dict[ImageName, ImageFacts] = {}
    for number, source in enumerate(sources):
        own = [image.name for image in names if isinstance(image, ImageId) and image.source == number]
        facts = inspect_images(source.images, own, image_cache(source), progress)
        found |= {ImageId(number, name): image for name, image in facts.items()}
    return found


def image_cache(source: Source) -> Path:
    """Return the file that caches the facts about a source's images."""
    images = source.images
    place = str(images.root) if isinstance(images, FolderImages) else source.fingerprint
    return cache_folder() / "images" / f"{hashlib.sha256(place.encode()).hexdigest()[:32]}.json"
