"""float16 with loss scaling, as on a T4: skipped steps are counted, and a resume is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava.training import stages
from tests.training.small_runs import recipe_of, run


@pytest.fixture
def float16(stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe in float16 with NF4 and dropout; its loss scale overflows at the start and again as it grows."""
    built = stages.build_trainer

    def build(*args: Any) -> Any:
        found = built(*args)
        found[0].accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
        return found

    monkeypatch.setattr(stages, "build_trainer", build)
    stage2_content["model"] = stage2_content["model"] | {"dtype": "float16"}
    stage2_content["lora"]["dropout"] = 0.1
    return stage2_content


def test_steps_that_overflow_are_skipped_and_counted_and_a_resume_is_exact(
    float16: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_steps": 10, "eval_every": 10, "save_every": 2, "gradient_accumulation": 2}
    float16["output_dir"] = str(tmp_path / "unbroken")
    output = run(recipe_of(float16, **settings))
    print(output)
    print(json.loads((tmp_path / "unbroken/metrics.json").read_text())["train"])
    print(capsys.readouterr().out)
    assert 0
