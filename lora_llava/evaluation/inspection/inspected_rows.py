"""The rows that an inspection reads: those of a run by their split, or those of another file."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation
from lora_llava.data.images.image_id import ImageName
from lora_llava.data.templates.spans import AnyTemplate
from lora_llava.evaluation.asked.data_file import DataFile, with_data_file
from lora_llava.evaluation.evaluate import OpenedEvaluation, as_llava
from lora_llava.evaluation.row_evaluation import choose_rows
from lora_llava.model.adapter_file import checked_base
from lora_llava.model.loading import check_bitsandbytes
from lora_llava.model.start import ModelPlan, plan_model
from lora_llava.planning.run_plan import build_run_processor
from lora_llava.recipe import EvaluationSection, Recipe, load_recipe
from lora_llava.recipe.io import RECIPE_FILE
from lora_llava.runs.check_run import check_run
from lora_llava.runs.directory import read_data_hashes, read_record
from lora_llava.splits.encoded_sources import encode_splits, open_sources, show_progress
from lora_llava.splits.split_rows import Split, build_split

OTHER = "data"
"""Name of the split of another file's rows."""


@dataclass(frozen=True)
class InspectedRow:
    """A row with its split."""

    split: str
    row: Conversation


@dataclass(frozen=True)
class OpenedInspection:
    """A run and its rows, before any weight is loaded.

    Attributes:
        folder: The run directory.
        recipe: Its recipe, with the data that is inspected.
        base: Its base model.
        plan: The plan of the model.
        tokenizer: The tokenizer of its processor.
        template: The conversation template.
        splits: The rows by split: `train` and the held-out ones, or `data`.
        notes: What a reader should know about the rows.
    """

    folder: Path
    recipe: Recipe
    base: str
    plan: ModelPlan
    tokenizer: Any
    template: AnyTemplate
    splits: dict[str, Split]
    notes: list[str] = field(default_factory=list)

    def evaluation(self) -> OpenedEvaluation:
        """Return what is needed to load the model."""
        name, split = next(iter(self.splits.items()))
        return OpenedEvaluation(
            self.recipe, self.base, self.folder, self.plan, self.tokenizer, split, name, self.template
        )

    def read(self, limit: int | None = None) -> list[InspectedRow]:
        """Read the rows, at most `limit` of all splits together, drawn by the recipe's seed."""
        places = [(name, index) for name, split in self.splits.items() for index in range(len(split.rows))]
        chosen = choose_rows(places, "all" if limit is None else limit, self.recipe.seed)
        found = []
        for name, split in self.splits.items():
            rows = split.read([index for of, index in chosen if of == name])
            found += [InspectedRow(name, row) for row in rows]
        return found


def open_inspection(run: str, data: str | None = None, image_folder: str | None = None) -> OpenedInspection:
    """Open a run and the rows to inspect.

    Args:
        run: A run directory.
        data: A file of rows in any form that training reads; None inspects the run's own rows.
        image_folder: Root folder of the images of `data`.

    Returns:
        The run and its rows.

    Raises:
        UserError: If the run, its base or the data is missing or does not fit.
    """
    folder = Path(run)
    check_run(run)
    record = read_record(folder)
    if not (folder / RECIPE_FILE).is_file():
        raise UserError(f"{run} has no {RECIPE_FILE}, so its rows are not known; name a run that was trained here")
    if image_folder is not None and data is None:
        raise UserError("--image-folder needs --data; add the file whose images are in that folder")
    recipe = load_recipe(folder / RECIPE_FILE)
    if data is not None:
        file = DataFile(Path(data), Path(image_folder) if image_folder is not None else None)
        recipe = with_data_file(recipe, file)
    if recipe.model.quantization == "nf4":
        check_bitsandbytes()
    base = str(checked_base(record, folder))
    plan = plan_model(as_llava(recipe.model, base))
    tokenizer, processor, template = build_run_processor(recipe, plan, trained=True)
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation or EvaluationSection()})
    if recipe.data.format == "scienceqa" and recipe.data.splits.test is None:
        recipe = recipe.model_copy(update={"evaluation": None})
    other = data is not None and recipe.data.format != "scienceqa"  # whose folder has several splits
    sources = open_sources(recipe, ["test"]) if other else None
    splits = {
        OTHER if other else name: build_split(recipe, name, split, processor, plan.config, show_progress, trusted=True)
        for name, split in encode_splits(recipe, tokenizer, template, show_progress, sources).items()
    }
    notes = [] if data is not None else _changes(folder, recipe, splits)
    return OpenedInspection(folder, recipe, base, plan, tokenizer, template, splits, notes)


def _changes(folder: Path, recipe: Recipe, splits: dict[str, Split]) -> list[str]:
    """Return a note if the rows are not those of the training."""
    known = read_data_hashes(folder)
    if recipe.data.on_bad_image != "error":  # the run left rows out for their images, which are not opened here
        return []
    changed = [name for name, split in splits.items() if known.get(name, split.fingerprint()) != split.fingerprint()]
    if not changed:
        return []
    return [f"The data has changed since training: rows of {', '.join(changed)} may have been in another split."]


def by_image(rows: list[InspectedRow], size: int, seed: int) -> list[list[int]]:
    """Cut rows into parts of about `size` that share few images.

    Args:
        rows: All rows.
        size: Rows of a part, at least, if a split has as many.
        seed: Seed of the order of images, so that a part has images from everywhere.

    Returns:
        Indices of each part; a part has rows of one split.
    """
    groups: dict[tuple[str, tuple[ImageName, ...]], list[int]] = {}
    for index, each in enumerate(rows):
        groups.setdefault((each.split, each.row.images), []).append(index)
    order = list(groups)
    random.Random(seed).shuffle(order)
    parts: list[list[int]] = []
    for split in dict.fromkeys(name for name, _ in groups):
        mine = [index for key in order if key[0] == split for index in groups[key]]
        count = max(1, len(mine) // size)
        parts += [mine[len(mine) * i // count : len(mine) * (i + 1) // count] for i in range(count)]
    return parts


def without_images(row: Conversation) -> Conversation:
    """Return a row as a text-only row is written: without placeholders and the line breaks that they add."""
    turns = tuple(replace(turn, text=_without_placeholders(turn.text)) for turn in row.turns)
    return replace(row, images=(), turns=turns)


def _without_placeholders(text: str) -> str:
    lines = []
    for line in text.split("\n"):
        left = line.replace(IMAGE_PLACEHOLDER, "")
        if left == line or left.strip():
            lines.append(left)
    return "\n".join(lines)
