"""What `check` calls an error in a whole source or between splits: one rule, by which `finetune` refuses too."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from lora_llava.core.errors import UserError
from lora_llava.data.findings import CheckedSource, Finding, asked_again, leaks, whole_source_errors
from lora_llava.data.formats import IMAGE_SUFFIXES
from lora_llava.data.images.image_check import ImageFacts, inspect_images
from lora_llava.data.images.reading import FolderImages
from lora_llava.data.sources import Source
from lora_llava.recipe import ColumnsSection, Recipe, SourceSection
from lora_llava.splits.encoded_sources import OpenSplit, image_cache

_LOOKED_AT = 10_000
"""Files of a folder among which an image is looked for."""


def checked_sources(
    splits: Mapping[str, OpenSplit], images: Mapping[int, Mapping[str, ImageFacts]]
) -> list[CheckedSource]:
    """Each source's part in each split.

    Args:
        splits: From `encode_splits`.
        images: What is known of a source's images, by the `id` of the source.
    """
    return [
        CheckedSource(
            name, source.name, table, split.places[split.places[:, 0] == place, 1], images.get(id(source), {})
        )
        for name, split in splits.items()
        for place, (source, table) in enumerate(zip(split.sources, split.tables, strict=True))
    ]


def sources_with_images(recipe: Recipe, splits: Mapping[str, OpenSplit]) -> set[str]:
    """Names of the sources that should have images: the recipe says where they are, or they are beside the file.

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
            if section is not None and (_says_so(section) or _has_images_beside(source, used)):
                found.add(source.name)
    return found


def _says_so(section: SourceSection) -> bool:
    return section.image_folder is not None or section.columns.image != ColumnsSection().image


def _has_images_beside(source: Source, used: set[str]) -> bool:
    """Whether images are where a source's would be, and are not another source's."""
    images = source.images
    if source.file is None or not isinstance(images, FolderImages) or str(images.root) in used:
        return False
    root = Path(images.root)
    return any(name.lower().endswith(IMAGE_SUFFIXES) for name in islice(_files(root, source.file.parent), _LOOKED_AT))


def _files(root: Path, beside: Path) -> Iterable[str]:
    """Names of files in a folder of images, at any depth; where it is the data's own folder, only in itself."""
    for _, _, names in os.walk(root):
        yield from names
        if root == beside:
            return


def refuse_errors(recipe: Recipe, splits: Mapping[str, OpenSplit]) -> None:
    """Refuse a run over sources or splits that `check` calls wrong as a whole.

    Args:
        recipe: The recipe.
        splits: From `encode_splits`.

    Raises:
        UserError: For a source without rows, one that should have images and has none, and held-out rows that are
            trained on, except in a published split.
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
    more = f"; {len(errors) - 1:,} more errors: `lora-llava check` lists them" if len(errors) > 1 else ""
    raise UserError(f"{named}{first.message}{more}")
