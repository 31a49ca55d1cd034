"""The rows of the run that a recipe continues: as it recorded them, or read again for a run of an earlier version."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.core.json_files import read_object_if_any
from lora_llava.data.templates.spans import AnyTemplate
from lora_llava.recipe import EvaluationSection, Recipe, load_recipe
from lora_llava.recipe.io import RECIPE_FILE
from lora_llava.splits.encoded_sources import Progress, encode_splits, no_progress
from lora_llava.splits.seen_rows import SEEN_FILE, SeenRows, read_seen, seen_of
from lora_llava.splits.split_rows import build_split

_FINGERPRINTS = "data.json"
"""The hashes of a run's rows by split, in its directory."""


def earlier_rows(
    recipe: Recipe, processor: Any, template: AnyTemplate, config: LlavaConfig, progress: Progress = no_progress
) -> SeenRows | None:
    """Return the rows of the run that a recipe continues, or that its base was merged from, and of the runs before it.

    Args:
        recipe: The recipe.
        processor: The stock processor, as that run's.
        template: The conversation template, as that run's.
        config: The model's config.
        progress: Wraps rows and images that are read again.

    Returns:
        The rows; None if the recipe continues no run, and its base is not one that a run was merged into.

    Raises:
        UserError: If the run's record is damaged.
    """
    start = recipe.model.start_from
    if start.run is not None:
        return rows_of_run(start.run, processor, template, config, progress)
    if start.llava is not None and (Path(start.llava) / SEEN_FILE).is_file():
        return rows_of_run(start.llava, processor, template, config, progress)
    return None


def rows_of_run(
    run: str, processor: Any, template: AnyTemplate, config: LlavaConfig, progress: Progress = no_progress
) -> SeenRows:
    """Return the rows that a run and the runs before it trained and held out; arguments as in `earlier_rows`.

    Raises:
        UserError: If the run's record is damaged.
    """
    recorded = read_seen(Path(run))
    name = str(getattr(run, "written", run))
    if recorded is None:
        return _read_again(Path(run), name, processor, template, config, progress)
    own, before = recorded
    return replace(own | before if before is not None else own, run=name)


def _read_again(
    run: Path, name: str, processor: Any, template: AnyTemplate, config: LlavaConfig, progress: Progress
) -> SeenRows:
    """Read the data of a run that recorded no images; without it, return no rows and a line about that."""
    try:
        recipe = load_recipe(run / RECIPE_FILE)
        recipe = recipe.model_copy(update={"evaluation": recipe.evaluation or EvaluationSection()})
        opened = encode_splits(recipe, processor.tokenizer, template, progress)
        splits = {part: build_split(recipe, part, split, processor, config, progress) for part, split in opened.items()}
    except (UserError, OSError) as error:
        return SeenRows(run=name, warning=_unknown(name, f"its data cannot be read ({error})"))
    known = read_object_if_any(run / _FINGERPRINTS).get("train")
    changed = known is not None and known != splits["train"].fingerprint()
    return replace(seen_of(splits), run=name, warning=_unknown(name, "its data has changed since") if changed else "")


def _unknown(name: str, reason: str) -> str:
    return (
        f"{name} recorded no images (an earlier version trained it), and {reason}: rows that it trained may be held "
        "out now; name other held-out rows with data.test_source"
    )
