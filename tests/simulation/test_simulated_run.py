"""`finetune` runs from its recipe to its results on a card, and so does what measures and describes a card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.simulation.settings import CARD


@pytest.mark.more
def test_a_run_trains_on_the_card_to_its_results(
    fake_cuda: Callable[..., Any], stage2_content: dict[str, Any], tmp_path: Any
) -> None:
    recipe = stage2_content | {"model": stage2_content["model"] | {"quantization": "none"}, "evaluation": None}
    recipe["training"] = recipe["training"] | {"vision_cache": "off", "max_steps": 2}
    metrics = fake_cuda([{"kind": "finetune", "recipe": recipe}])[0]["metrics"]
    assert metrics["machine"] == {"gpu": "fake", "gpus": 1, "gpu_memory_bytes": CARD}
    assert metrics["train"]["steps"] == 2
    assert 0 < metrics["train"]["peak_memory_bytes"] < metrics["step"]["planned_bytes"]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.more
def test_the_card_is_described_timed_and_measured(fake_cuda: Callable[..., Any]) -> None:
    found = fake_cuda([{"kind": "branches"}])[0]
    assert found["device"] == "fake, 32.0 GiB"
    assert found["machine"] == {"gpu": "fake", "gpus": 1, "gpu_memory_bytes": CARD}
    assert found["budget"] == [CARD + 550_000_000, "free on the GPU, fake"]
    assert found["random"] == ["cuda", "numpy", "python", "torch"]
    assert found["padding_free"]
    assert found["stays"]
    assert found["seconds"] > 0
    assert found["seconds_without_memory"] is None
    assert found["fits"]["losses"] == [1.0, 1.0]
    assert 0 < found["fits"]["peak_memory_bytes"] < found["fits"]["planned_bytes"]
    assert "over the cap of 551048576" in found["too_small"]["out_of_memory"]
