"""Plans of small recipes with own rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_llava.planning.run_plan import RunPlan, plan_run
from lora_llava.recipe.io import check_recipe

Plan = Callable[..., RunPlan]


@pytest.fixture
def plan(stage2_content: dict[str, Any]) -> Plan:
    def planned(training: dict[str, Any] | None = None, **data: Any) -> RunPlan:
        content = stage2_content | {"evaluation": None}
        content["data"] = {"format": "conversations", "max_length": 300, "system_prompt": "", **data}
        content["training"] = content["training"] | (training or {})
        return plan_run(check_recipe(content, "test"))

    return planned


@pytest.fixture
def own_content(
    stage2_content: dict[str, Any], parts: Path, scienceqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """A recipe with copies of the parts and data and a separate cache, which a test may change."""
    monkeypatch.setenv("LORA_LLAVA_CACHE", str(tmp_path / "cache"))
    shutil.copytree(parts, tmp_path / "parts")
    shutil.copytree(scienceqa, tmp_path / "data")
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / "parts" / "vision_tower" / "preprocessor_config.json").write_text(json.dumps(settings))
    stage2_content["model"] |= {"llm": f"{tmp_path}/parts/llm", "vision_tower": f"{tmp_path}/parts/vision_tower"}
    stage2_content["data"]["path"] = f"{tmp_path}/data"
    stage2_content["training"] |= {"max_steps": 6, "eval_every": 2}
    stage2_content["evaluation"] = {"before": 2, "after": 2, "max_new_tokens": 2}
    return stage2_content
