"""Choose the rows that an evaluation asks, report them, and name its files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.data.selection import Report
from lora_llava.data.templates.spans import AnyTemplate
from lora_llava.evaluation.asked.data_file import DataFile, recipe_for, with_data_file
from lora_llava.evaluation.row_evaluation import report
from lora_llava.inference.client.client import ChatServer
from lora_llava.model.start import ModelPlan
from lora_llava.recipe import Recipe, load_recipe, override_recipe
from lora_llava.recipe.io import RECIPE_FILE
from lora_llava.runs.directory import read_data_hashes
from lora_llava.splits.earlier_rows import earlier_rows
from lora_llava.splits.seen_rows import SeenRows, read_seen
from lora_llava.splits.split_rows import Split, over_positions

OTHER_DATA = ("data.path=", "data.file=", "data.format=", "data.sources")
"""Overrides that name other training rows."""


def report_asked(
    split: Split,
    asked: int,
    name: str,
    recipe: Recipe,
    overrides: Sequence[str],
    data: DataFile | None,
    config: LlavaConfig,
) -> None:
    """Print how many rows are asked, whether some are too long, and what an override of the training rows does.

    Args:
        split: The rows that could be asked.
        asked: Number of rows that are.
        name: Name of the split.
        recipe: The recipe.
        overrides: Overrides of the recipe.
        data: The file whose rows are asked; None for the recipe's held-out rows.
        config: The model's config.
    """
    if long := over_positions(split, config):
        report(f"warning: {long}")
    if data is not None:
        report(f"asking {asked:,} of {split.report.rows:,} rows of {data.path.name}{_dropped(split.report)}")
        return
    other = next((text for text in overrides if text.startswith(OTHER_DATA)), None)
    if other is None or recipe.data.format == "scienceqa":
        report(f"asking {asked:,} of {split.report.rows:,} held-out rows ({name}){_dropped(split.report)}")
        return
    value = other.partition("=")[2]
    if getattr(recipe.data, f"{name}_source"):
        report(
            f"warning: {other} changes the training rows alone: the {asked:,} rows of data.{name}_source are asked; to "
            f"ask all rows of {value}, use --data {value}"
        )
        return
    total = sum(map(len, split.rows.tables))
    report(
        f"warning: {other}: asking {asked:,} of {total:,} rows, those that data.{name}_rows={split.report.rows} holds "
        f"out of them; to ask all {total:,}, use --data {value}"
    )


def _dropped(report: Report) -> str:
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
    return f"; not usable: {dropped}" if dropped else ""


def other_suffix(
    recipe: str | None, overrides: Sequence[str], limit: int | None, server: ChatServer | None, data: DataFile | None
) -> str:
    """Return the suffix of the file names for other questions or another source of answers than the run's own."""
    changed = sorted(text for text in overrides if text.startswith("data."))
    parts = {
        "server": server is not None,
        Path(recipe or "").stem: recipe is not None,
        data.suffix() if data is not None else "": data is not None,
        f"limit{limit}": limit is not None,
        hashlib.sha256("\n".join(changed).encode()).hexdigest()[:6]: bool(changed),
    }
    return "".join(f"_{name}" for name, is_set in parts.items() if is_set)


def choose_recipe(
    model: str,
    run: bool,
    recipe: str | None,
    overrides: Sequence[str],
    server: ChatServer | None,
    data: DataFile | None,
) -> Recipe:
    """Return the recipe whose questions are evaluated: the named one, or the one in the model's folder."""
    file = Path(model) / RECIPE_FILE
    if recipe is None and not file.is_file():
        if data is None or run or server is not None:
            raise UserError(
                f"{model} is not a finished run and has no recipe; name the recipe with the questions with --recipe"
                + ("" if server is not None else ", or rows with --data")
            )
        return override_recipe(with_data_file(recipe_for(model, data), data), overrides)
    if not run and recipe is None:  # a merged folder is evaluated as it is stored
        overrides = ["model.quantization=none", *overrides]
    chosen = load_recipe(recipe or file, overrides)
    return with_data_file(chosen, data) if data is not None else chosen


def earlier_of(
    folder: Path, recipe: str | None, chosen: Recipe, processor: Any, template: AnyTemplate, plan: ModelPlan
) -> SeenRows | None:
    """Return the rows of the runs that a recipe continues; the run's own record of them, if it is its own recipe."""
    if recipe is None or Path(recipe).resolve() == (folder / RECIPE_FILE).resolve():
        recorded = read_seen(folder)
        if recorded is not None:
            return recorded[1]
    return earlier_rows(chosen, processor, template, plan.config)


def check_same_rows(folder: Path, recipe: Recipe, split: Split) -> None:
    """Check that the rows drawn from the training data are those that the run held out.

    Raises:
        UserError: If the data has changed since: the rows may have been trained on.
    """
    if not are_same_rows(folder, recipe, split):
        raise UserError(
            f"{folder}: the data has changed since training: the rows held out now may have been trained on; "
            "restore it, or name other rows with data.test_rows=0 data.test_source={path: FILE}"
        )


def are_same_rows(folder: Path, recipe: Recipe, split: Split) -> bool:
    data = recipe.data
    name = "test" if data.test_rows else "validation"
    own = data.test_source or (data.validation_source and name == "validation")
    known = read_data_hashes(folder).get(name)
    return data.format != "conversations" or bool(own) or known in (None, split.fingerprint())
