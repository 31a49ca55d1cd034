"""`finetune` runs from its recipe to its results on a card, and reports a card that is too small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lora_llava.planning.memory import CUDA_CONTEXT


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


@pytest.mark.more
def test_answers_timing_and_the_benchmark_on_the_card(fake_cuda: Callable[..., Any]) -> None:
    found = fake_cuda([{"kind": "branches"}])[0]
    assert found["device"] == "fake, 24.0 GiB"
    assert found["machine"] == {"gpu": "fake", "gpus": 1, "gpu_memory_bytes": 24 * 2**30}
    assert found["budget"] == [24 * 2**30 + CUDA_CONTEXT, "free on the GPU"]
    assert found["random"] == ["cuda", "numpy", "python", "torch"]
    assert (found["padding_free"], found["stays"]) == (True, True)
    assert found["seconds"] > 0
    assert found["seconds_without_memory"] is None
    assert found["fits"]["name"] == "ours_cached"
    assert found["fits"]["peak_memory_bytes"] < found["fits"]["planned_bytes"]
    assert found["too_small"]["out_of_memory"].startswith("the plan needs at least")
