"""Parameter-efficient fine-tuning of LLaVA: LoRA and QLoRA on one consumer GPU."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_llava.api import Model, Run, evaluate, finetune, load_model, merge
    from lora_llava.core.errors import UserError
    from lora_llava.recipe import Recipe, load_recipe

__version__ = "0.1.0"
__all__ = ["Model", "Recipe", "Run", "UserError", "evaluate", "finetune", "load_model", "load_recipe", "merge"]

_MODULES = {"UserError": "core.errors", "Recipe": "recipe", "load_recipe": "recipe"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used, so that `import lora_llava` is fast and loads no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'lora_llava' has no attribute {name!r}")
    return getattr(import_module(f"lora_llava.{_MODULES.get(name, 'api')}"), name)
