"""Plans of small recipes over one's own rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lora_llava.recipe.io import check_recipe
from lora_llava.training.plan import RunPlan, plan_run

Plan = Callable[..., RunPlan]


@pytest.fixture
def plan(stage2_content: dict[str, Any]) -> Plan:
    def planned(training: dict[str, Any] | None = None, **data: Any) -> RunPlan:
        content = stage2_content | {"evaluation": None}
        content["data"] = {"format": "conversations", "max_length": 300, "system_prompt": "", **data}
        content["training"] = content["training"] | (training or {})
        return plan_run(check_recipe(content, "test"))

    return planned
