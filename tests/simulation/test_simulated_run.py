"""`finetune` runs from its recipe to its results on a card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.more
def test_a_run_trains_on_the_card_to_its_results(
    fake_cuda: Callable[..., Any], stage2_content: dict[str, Any], tmp_path: Any
) -> None:
    recipe = stage2_content | {"model": stage2_content["model"] | {"quantization": "none"}, "evaluation": None}
    recipe["training"] = recipe["training"] | {"vision_cache": "off", "max_steps": 2}
    metrics = fake_cuda([{"kind": "finetune", "recipe": recipe}])[0]["metrics"]
    assert metrics["machine"] == {"gpu": "fake", "gpus": 1, "gpu_memory_bytes": 24 * 2**30}
    assert metrics["train"]["steps"] == 2
    assert 0 < metrics["train"]["peak_memory_bytes"] < metrics["step"]["planned_bytes"]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
