"""Recipes: what a run is to do."""

from lora_llava.recipe.io import (
    RecipeError,
    copy_recipes,
    dump_recipe,
    find_recipe,
    json_schema,
    load_recipe,
    recipe_hash,
    shipped_recipes,
)
from lora_llava.recipe.schema import (
    DataSection,
    EvaluationSection,
    LoraSection,
    ModelSection,
    Recipe,
    StartFrom,
    TrainingSection,
)

__all__ = [
    "DataSection", "EvaluationSection", "LoraSection", "ModelSection", "Recipe", "RecipeError", "StartFrom",
    "TrainingSection", "copy_recipes", "dump_recipe", "find_recipe", "json_schema", "load_recipe", "recipe_hash",
    "shipped_recipes",
]  # fmt: skip
