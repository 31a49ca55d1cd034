"""The Stage 1 run that a Stage 2 recipe starts from."""

from __future__ import annotations

import os
from pathlib import Path

from lora_llava.core.errors import UserError
from lora_llava.core.storage import FoundPath, looked_in
from lora_llava.recipe import Recipe, load_recipe, recipe_hash
from lora_llava.runs.check_run import check_run
from lora_llava.runs.directory import is_run, read_record


def stage1_of(recipe: Recipe, recipe_folder: Path) -> Recipe | None:
    """Return the Stage 1 recipe that a recipe starts from, or None.

    Raises:
        UserError: If the named recipe is not a Stage 1 recipe.
    """
    name = recipe.model.start_from.stage1_recipe
    if name is None or recipe.model.start_from.run is not None:
        return None
    beside = recipe_folder / name
    stage1 = load_recipe(beside if beside.is_file() else name)
    if stage1.stage != 1:
        raise UserError(f"model.start_from.stage1_recipe: {name} is a Stage {stage1.stage} recipe; name one of Stage 1")
    own, other = (each.model.model_dump(mode="json") for each in (recipe, stage1))
    for field in ("llm", "vision_tower", "projector_type", "high_resolution"):
        fits = other[field] == own[field] or (field == "high_resolution" and other[field] is None)
        if not fits:
            raise UserError(
                f"model.start_from.stage1_recipe: {name} has model.{field} {other[field]!r}, this recipe "
                f"{own[field]!r}; make them the same"
            )
    return stage1


def finished_stage1(stage1: Recipe) -> bool:
    """Check whether a Stage 1 recipe has a finished run.

    Raises:
        UserError: If its directory has the run of another recipe.
    """
    folder = Path(stage1.output_dir)
    if not is_run(folder):
        return False
    if read_record(folder)["recipe_hash"] != recipe_hash(stage1):
        raise UserError(
            f"{folder} was trained with another Stage 1 recipe; remove it to train again, or set "
            f"model.start_from={{stage1_run: {folder}}} to use it"
        )
    return True


def with_stage1_run(recipe: Recipe, run: Path) -> Recipe:
    """Return the recipe with its `stage1_recipe` replaced by that recipe's run."""
    start = recipe.model.start_from.model_copy(
        update={"stage1_recipe": None, "stage1_run": FoundPath(os.path.abspath(run), str(run))}
    )
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"start_from": start})})


def check_stage1_run(recipe: Recipe) -> None:
    """Refuse a `stage1_run` that does not exist, and name the run that was meant.

    Raises:
        UserError: With the field, and a run of a similar name or those beside it.
    """
    run = recipe.model.start_from.stage1_run
    if run is not None and not Path(run).exists():
        try:
            check_run(run, "a finished run of Stage 1, or its recipe as stage1_recipe")
        except UserError as error:
            raise UserError(f"model.start_from.stage1_run: {error}{looked_in(run)}") from None
