"""`finetune` runs from its recipe to its results on a card, and reports a card that is too small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.more
def test_a_run_trains_on_the_card_to_its_results(
    fake_cuda: Callable[..., Any], stage2_content: dict[str, Any], tmp_path: Any
) -> None:
    recipe = stage2_content | {"model": stage2_content["model"] | {"quantization": "none"}}
    recipe["training"] = recipe["training"] | {"vision_cache": "off"}
    small = recipe | {"output_dir": str(tmp_path / "small")}
    done, refused = fake_cuda(
        [{"kind": "finetune", "recipe": recipe}, {"kind": "finetune", "recipe": small, "limit": 3_000_000}]
    )
    metrics = done["metrics"]
    assert metrics["machine"]["gpu"] == "fake"
    assert metrics["train"]["steps"] == 4
    assert metrics["train"]["peak_memory_bytes"] < metrics["step"]["planned_bytes"]
    assert refused["error"].startswith("the GPU's memory ran out at a step planned at")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
