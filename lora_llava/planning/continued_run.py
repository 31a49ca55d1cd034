"""Check that a recipe that continues a run has the run's base, adapter, template and images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lora_llava.core.errors import UserError
from lora_llava.data.templates.chat_template import saved_text
from lora_llava.model.provenance import component_hashes
from lora_llava.model.start import RUN_FILE
from lora_llava.model.weights.parts import load_part, local_folder
from lora_llava.recipe import Recipe, load_recipe
from lora_llava.recipe.continued import other_settings
from lora_llava.recipe.io import RECIPE_FILE

_PARTS = ("llm", "vision_tower")


def check_continued(recipe: Recipe) -> None:
    """Refuse a recipe that continues a run with another base or another adapter.

    Args:
        recipe: The recipe, filled from the run; `plan_model` has checked that the run is finished.

    Raises:
        UserError: Naming the first setting that differs, or a run that is its own output directory.
    """
    run = recipe.model.start_from.run
    if run is None:
        return
    refuse_own_folder(recipe)
    file = Path(run) / RECIPE_FILE
    if not file.is_file():
        raise UserError(
            f"model.start_from.run: {run} has no {RECIPE_FILE}; merge it with `lora-llava merge {run} --output MERGED` "
            "and train a new adapter with model.start_from={llava: MERGED}"
        )
    record = json.loads((Path(run) / RUN_FILE).read_text(encoding="utf-8"))
    _check_base(recipe, record["base"], _name(run))
    for key, own, other in other_settings(recipe, load_recipe(file)):
        fix = "leave it out"
        if key.startswith(("lora.", "model.new_tokens", "model.quantization", "model.max_tiles")):
            fix += (
                f", or merge the run (lora-llava merge {_name(run)} --output MERGED) and train a new adapter with "
                "model.start_from={llava: MERGED}"
            )
        raise UserError(
            f"{key} is {_shown(own)}, but {_name(run)}, which the recipe continues, has {_shown(other)}; {fix}"
        )


def refuse_own_folder(recipe: Recipe) -> None:
    """Refuse a run that would be written over the run that it continues.

    Raises:
        UserError: If `output_dir` is `model.start_from.run`.
    """
    run = recipe.model.start_from.run
    if run is not None and Path(run).resolve() == Path(recipe.output_dir).resolve():
        raise UserError(f"output_dir: {recipe.output_dir} is the run that the recipe continues; set output_dir=OTHER")


def check_continued_processor(recipe: Recipe, processor: Any) -> None:
    """Refuse another chat template or system text than those of the run that a recipe continues.

    Args:
        recipe: The recipe.
        processor: The processor of the new run.

    Raises:
        UserError: If they differ.
    """
    run = recipe.model.start_from.run
    if run is None:
        return
    before = saved_text(Path(run))
    if before is not None and before != processor.chat_template:
        raise UserError(
            f"data.template is {recipe.data.template} and data.system_prompt is {_shown(recipe.data.system_prompt)}, "
            f"but {_name(run)}, which the recipe continues, was trained with another template or system text; leave "
            "both out"
        )


def _check_base(recipe: Recipe, base: dict[str, Any], run: str) -> None:
    """Compare the base that a recipe names with the run's, by content: a moved folder is the same base."""
    model, parts = recipe.model, base.get("parts")
    llava = model.start_from.llava
    if llava is not None and (parts is not None or not _is_llava(llava, base)):
        raise _other_base("model.start_from.llava", llava, base, run)
    for name in _PARTS:
        own = getattr(model, name)
        if own is None:
            continue
        if parts is None:
            raise _other_base(f"model.{name}", own, base, run)
        if own == parts[name]:
            continue
        if load_part(own, getattr(model, f"{name}_revision"), name).revision != parts[f"{name}_revision"]:
            raise _other_base(f"model.{name}", own, base, run)


def _is_llava(name: str, base: dict[str, Any]) -> bool:
    """Check whether a complete LLaVA is a run's base, by its name or the hashes of its weights."""
    folder = local_folder(name, "start_from.llava")
    if folder is None or str(folder.resolve()) == base["name"]:
        return folder is not None or name == base["name"]
    return bool(base.get("hashes")) and component_hashes(folder) == base["hashes"]


def _other_base(key: str, own: str, base: dict[str, Any], run: str) -> UserError:
    parts = base.get("parts")
    trained = f"{parts['llm']} and {parts['vision_tower']}" if parts else base["name"]
    return UserError(
        f"{key} is {own}, but {run}, which the recipe continues, was trained on {trained}; leave {key} out, or train a "
        "new adapter on the new base"
    )


def _name(run: str) -> str:
    return str(getattr(run, "written", run))


def _shown(value: Any) -> str:
    return json.dumps(value.model_dump(mode="json") if isinstance(value, BaseModel) else value)
