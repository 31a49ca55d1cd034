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
    ColumnsSection,
    DataSection,
    EvaluationSection,
    LoraSection,
    ModelSection,
    Recipe,
    SourceSection,
    StartFrom,
    TrainingSection,
)

__all__ = [
    "ColumnsSection", "DataSection", "EvaluationSection", "LoraSection", "ModelSection", "Recipe", "RecipeError",
    "SourceSection", "StartFrom", "TrainingSection", "copy_recipes", "dump_recipe", "find_recipe", "json_schema",
    "load_recipe", "recipe_hash", "shipped_recipes",
]  # fmt: skip
