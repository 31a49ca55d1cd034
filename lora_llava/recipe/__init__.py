"""Recipes: what a run is to do."""

from lora_llava.recipe.generate_schema import (
    ContextsSection,
    FlavoursSection,
    GatesSection,
    GenerateRecipe,
    TeacherSection,
)
from lora_llava.recipe.io import (
    RecipeError,
    copy_recipes,
    dump_recipe,
    find_recipe,
    json_schema,
    load_generate_recipe,
    load_recipe,
    recipe_hash,
    shipped_generate_recipes,
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
    "ColumnsSection",
    "ContextsSection",
    "DataSection",
    "EvaluationSection",
    "FlavoursSection",
    "GatesSection",
    "GenerateRecipe",
    "LoraSection",
    "ModelSection",
    "Recipe",
    "RecipeError",
    "SourceSection",
    "StartFrom",
    "TeacherSection",
    "TrainingSection",
    "copy_recipes",
    "dump_recipe",
    "find_recipe",
    "json_schema",
    "load_generate_recipe",
    "load_recipe",
    "recipe_hash",
    "shipped_generate_recipes",
    "shipped_recipes",
]
