"""A small model with questions for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava.data.conversation import Conversation
from lora_llava.evaluation.answerers import Evaluator
from lora_llava.model.families.image_counts import tokens_of
from lora_llava.model.start import prepare_base
from lora_llava.planning.run_plan import plan_run
from lora_llava.recipe.io import check_recipe
from lora_llava.training.stages import build_trained_model


@pytest.fixture(scope="session")
def speaking(
    parts: Path, scienceqa: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Evaluator, list[Conversation]]:
    """Build a small model with an adapter far from zero, and twelve questions, six of them with an image."""
    content: dict[str, Any] = {
        "stage": 2,
        "output_dir": str(tmp_path_factory.mktemp("run")),
        "model": {
            "llm": str(parts / "llm"),
            "vision_tower": str(parts / "vision_tower"),
            "start_from": {"untrained": True},
            "quantization": "none",
        },
        "lora": {"r": 4, "alpha": 32},
        "data": {"format": "scienceqa", "path": str(scienceqa), "max_length": 400, "system_prompt": ""},
        "training": {"batch_size": 4, "learning_rate": 5e-3, "max_steps": 4},
        "evaluation": {"max_new_tokens": 4},
    }
    recipe = check_recipe(content, "test")
    plan = plan_run(recipe)
    model = build_trained_model(recipe, prepare_base(recipe.model, 0)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    asked = Evaluator(
        model, plan.tokenizer, plan.template, tokens_of(plan.model.config, {}), plan.splits["train"].load_pixels, 5
    )
    return asked, plan.splits["train"].read(range(12))
