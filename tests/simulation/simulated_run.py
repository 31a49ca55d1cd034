"""`finetune` from its recipe to its results on a card that is not there, with a small model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from peft.utils import save_and_load
from rich.console import Console
from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.model import loading
from lora_llava.model.random_weights import build_random_llava
from lora_llava.model.start import prepare_base
from lora_llava.recipe.io import check_recipe
from lora_llava.runs import state_files
from lora_llava.training import stages
from lora_llava.training.finetune import finetune
from tests.simulation.meter import Meter
from tests.simulation.simulated_step import on_card
from tests.simulation.stand_ins import really


def run_finetune(recipe: dict[str, Any], meters: list[Meter], limit: int | None = None) -> dict[str, Any]:
    """Run a recipe; weights are drawn, and every loss is 1.

    Args:
        recipe: The recipe's content, with `model.quantization` none.
        meters: From `pretend`.
        limit: Bytes of the card that an allocation may not pass.

    Returns:
        `printed`, and `metrics` or `error`.
    """
    checked, printed = check_recipe(recipe, "simulation"), io.StringIO()
    prepare_base(checked.model, checked.seed)  # with real tensors; later it is found
    stages.load_base = _drawn
    for module, name in ((save_and_load, "safe_load_file"), (state_files, "load_file")):
        setattr(module, name, really(getattr(module, name)))
    safetensors.torch._to_ndarray = lambda tensor: (np.zeros(tensor.nbytes, np.uint8), tensor)
    with on_card(Meter(limit=limit), meters):
        try:
            metrics = finetune(checked, Path(), console=Console(file=printed, width=80))
        except UserError as error:
            return {"printed": printed.getvalue(), "error": str(error)}
    return {"printed": printed.getvalue(), "metrics": metrics}


def _drawn(base: Any, **options: Any) -> Any:
    """`load_base` with random weights: a fake tensor cannot be filled from a file."""
    return build_random_llava(
        LlavaConfig.from_pretrained(base),
        quantization="none",
        dtype=loading.resolve_dtype(options["dtype"]),
        device=torch.device("cuda", 0),
        with_tower=options["with_tower"],
    )
