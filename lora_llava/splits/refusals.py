"""Errors of complete sources and between splits, which `check` reports and `finetune` refuses."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from lora_llava.core.errors import UserError
from lora_llava.data.checks.duplicates import asked_again, leaks
from lora_llava.data.checks.findings import CheckedSource, Finding
from lora_llava.data.checks.source_checks import whole_source_errors
from lora_llava.data.formats import IMAGE_SUFFIXES
from lora_llava.data.images.image_check import ImageFacts, inspect_images
from lora_llava.data.images.image_sources import FolderImages
from lora_llava.data.sources import Source
from lora_llava.recipe import ColumnsSection, Recipe, SourceSection
from lora_llava.splits.encoded_sources import OpenSplit, image_cache

_MOST_FILES = 10_000
"""Most files of a folder that are searched for an image."""


def checked_sources(
    splits: Mapping[str, OpenSplit], images: Mapping[int, Mapping[str, ImageFacts]]
) -> list[CheckedSource]:
    """Return the part of each source in each split.

    Args:
        splits: From `encode_splits`.
        images: The facts about each source's images, by the `id` of the source.
    """
    return [
        CheckedSource(
            name, source.name, table, split.places[split.places[:, 0] == place, 1], images.get(id(source), {})
        )
        for name, split in splits.items()
        for place, (source, table) in enumerate(zip(split.sources, split.tables, strict=True))
    ]


def sources_with_images(recipe: Recipe, splits: Mapping[str, OpenSplit]) -> set[str]:
    """Return the names of the sources that should have images: by the recipe, or by images beside the file.

    Args:
        recipe: The recipe.
        splits: From `encode_splits`.
    """
    data = recipe.data
    sections: dict[str, tuple[SourceSection | None, ...]] = {
        "train": data.train_sources(),
        "validation": (data.validation_source,),
        "test": (data.test_source,),
    }
    used = {
        str(source.images.root)
        for split in splits.values()
        for source, table in zip(split.sources, split.tables, strict=True)
        if isinstance(source.images, FolderImages) and table.image_counts.any()
    }
    found = set()
    for name, split in splits.items():
        own = sections[name] if len(sections[name]) == len(split.sources) else (None,) * len(split.sources)
        for source, section in zip(split.sources, own, strict=True):
            if section is not None and (_names_images(section) or _has_images_beside(source, used)):
                found.add(source.name)
    return found


def _names_images(section: SourceSection) -> bool:
    return section.image_folder is not None or section.columns.image != ColumnsSection().image


def _has_images_beside(source: Source, used: set[str]) -> bool:
    """Check whether the folder of a source's images has images that no other source uses."""
    images = source.images
    if source.file is None or not isinstance(images, FolderImages) or str(images.root) in used:
        return False
    root = Path(images.root)
    return any(name.lower().endswith(IMAGE_SUFFIXES) for name in islice(_files(root, source.file.parent), _MOST_FILES))


def _files(root: Path, beside: Path) -> Iterable[str]:
    """Yield the file names in a folder of images, at any depth, except in the data's own folder."""
    for _, _, names in os.walk(root):
        yield from names
        if root == beside:
            return


def refuse_errors(recipe: Recipe, splits: Mapping[str, OpenSplit]) -> None:
    """Refuse a run if `check` finds errors in complete sources or between splits.

    Args:
        recipe: The recipe.
        splits: From `encode_splits`.

    Raises:
        UserError: If a source has no rows, or no images although it should, or held-out rows are trained on in a split
            that is not published.
    """
    _refuse(list(whole_source_errors(checked_sources(splits, {}), sources_with_images(recipe, splits))))
    if recipe.data.format == "scienceqa" or len(splits) == 1:
        return
    sources = [source for split in splits.values() for source in split.sources]
    known: dict[int, dict[str, ImageFacts]] = {}
    for place, names in asked_again(checked_sources(splits, {})).items():
        source = sources[place]
        known.setdefault(id(source), {}).update(inspect_images(source.images, names, image_cache(source)))
    _refuse(list(leaks(checked_sources(splits, known))))


def _refuse(errors: list[Finding]) -> None:
    if not errors:
        return
    first = errors[0]
    named = f"{first.split} {first.name}: " if first.name else ""
    more = f"; {len(errors) - 1:,} more errors; `lora-llava check` lists them" if len(errors) > 1 else ""
    raise UserError(f"{named}{first.message}{more}")
