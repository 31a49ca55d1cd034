"""What a recipe that continues a run takes from that run's recipe."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel

from lora_llava.recipe.schema import LINEARS, ORIGINS, LoraSection, Recipe, StartFrom

Part = TypeVar("Part", bound=BaseModel)

PARTS = ("llm", "llm_revision", "vision_tower", "vision_tower_revision")
"""Keys of `model` that name the parts of a base."""
MODEL_KEYS = ("projector_type", "quantization", "dtype", "new_tokens", "high_resolution", "max_tiles")
DATA_KEYS = ("template", "system_prompt", "image_aspect")
FREE_LORA_KEYS = ("dropout", "learning_rate")
"""Keys of `lora` and `lora.vision` that concern training alone, so that a continued run may change them."""


def lacks_values(recipe: Recipe) -> bool:
    """Check whether a recipe leaves out a value that it takes from the run it continues."""
    lora, model, data = recipe.lora, recipe.model, recipe.data
    if lora is None or lora.model_fields_set < set(LoraSection.model_fields):
        return True
    given = {*model.model_fields_set, *data.model_fields_set}
    return not {*PARTS, *MODEL_KEYS, *DATA_KEYS} <= given


def fill_from_run(recipe: Recipe, earlier: Recipe) -> Recipe:
    """Fill what a recipe leaves out with the values of the run that it continues.

    Args:
        recipe: The recipe, with `model.start_from.run`.
        earlier: The recipe of that run.

    Returns:
        The recipe with base, adapter settings, template and system text; values that it gives are kept, and
        `refuse_other_settings` compares them.
    """
    model, start, origin = recipe.model, recipe.model.start_from, earlier.model.start_from
    named = any(getattr(start, name) is not None for name in ORIGINS)
    if not named and not (origin.llava is not None and (model.llm or model.vision_tower)):
        update = {name: getattr(origin, name) for name in StartFrom.model_fields if name != "run"}
        model = model.model_copy(update={"start_from": start.model_copy(update=update)})
    has_parts = earlier.model.llm is not None and start.llava is None
    model = _filled(model, earlier.model, (*PARTS, *MODEL_KEYS) if has_parts else MODEL_KEYS)
    sections: dict[str, Any] = {"model": model, "data": _filled(recipe.data, earlier.data, DATA_KEYS)}
    if earlier.lora is not None:
        sections["lora"] = _filled_lora(recipe.lora, earlier.lora)
    return recipe.model_copy(update=sections)


def _filled_lora(lora: LoraSection | None, earlier: LoraSection) -> LoraSection:
    if lora is None:
        return earlier
    filled = _filled(lora, earlier, tuple(LoraSection.model_fields))
    if lora.vision is not None and earlier.vision is not None:
        names = tuple(type(lora.vision).model_fields)
        filled = filled.model_copy(update={"vision": _filled(lora.vision, earlier.vision, names)})
    return filled


def _filled(section: Part, earlier: Part, names: tuple[str, ...]) -> Part:
    left_out = {name: getattr(earlier, name) for name in names if name not in section.model_fields_set}
    return section.model_copy(update=left_out)


def other_settings(recipe: Recipe, earlier: Recipe) -> list[tuple[str, Any, Any]]:
    """Compare what an adapter depends on besides its base in two recipes.

    Args:
        recipe: The recipe that continues a run, filled.
        earlier: The recipe of that run.

    Returns:
        Keys that differ, each with the value of the recipe and that of the run.
    """
    pairs: list[tuple[str, Any, Any, str]] = [
        (f"model.{name}", recipe.model, earlier.model, name) for name in MODEL_KEYS if name != "dtype"
    ]
    own, other = recipe.lora, earlier.lora
    names = [name for name in LoraSection.model_fields if name not in (*FREE_LORA_KEYS, "vision")]
    pairs += [(f"lora.{name}", own, other, name) for name in names]
    found = [(key, getattr(mine, name), getattr(theirs, name)) for key, mine, theirs, name in pairs]
    found = [each for each in found if each[0] != "lora.targets" or _targets(each[1]) != _targets(each[2])]
    found.append(("lora.vision", _vision(own), _vision(other)))
    found.append(("data.image_aspect", image_aspect(recipe), image_aspect(earlier)))
    return [each for each in found if each[1] != each[2]]


def _targets(value: Any) -> Any:
    """Return the names of layers without their order; the seven names of earlier recipes are all layers of a Llama."""
    return frozenset(LINEARS if value in (None, "all-linear") else value)


def _vision(lora: LoraSection | None) -> dict[str, Any] | None:
    if lora is None or lora.vision is None:
        return None
    content = lora.vision.model_dump(exclude=set(FREE_LORA_KEYS))
    return content | {"alpha": lora.vision.alpha or lora.vision.r}


def image_aspect(recipe: Recipe) -> str:
    """Return how images become square: `auto` is pad for a LLaVA made of parts."""
    aspect = recipe.data.image_aspect
    return "pad" if aspect == "auto" and recipe.model.start_from.llava is None else aspect
