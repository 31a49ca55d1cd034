"""Recipes: the description of a run."""

from lora_llava.recipe.data_schema import ColumnsSection, DataSection, SourceSection
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
    override_recipe,
    recipe_hash,
    shipped_generate_recipes,
    shipped_recipes,
)
from lora_llava.recipe.schema import (
    EvaluationSection,
    LoraSection,
    ModelSection,
    Recipe,
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
    "override_recipe",
    "recipe_hash",
    "shipped_generate_recipes",
    "shipped_recipes",
]
