"""What `model.high_resolution` refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lora_llava.core.errors import UserError
from lora_llava.model.start import plan_model
from lora_llava.recipe.io import check_recipe
from tests.model.small_families import make_tower
from tests.training.assembled_tiles import stage1_of_demo

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"high_resolution": {"grid": []}}, "model.high_resolution.grid is []; name at least one"),
    (
        {"high_resolution": {"grid": [[64, 128], [64, 128]]}},
        "model.high_resolution.grid: the canvas [64, 128] is named twice; keep one",
    ),
    (
        {"high_resolution": {"grid": [[64, 100]]}},
        "model.high_resolution.grid: the canvas [64, 100] is not made of whole tiles; its height and width have to be "
        "multiples of the tower's 64 pixels, as in [64, 128]",
    ),
    ({"high_resolution": {"grid": [[0, 64]]}}, "model.high_resolution.grid.0.0 is 0; it should be greater than or"),
    (
        {"high_resolution": {"grid": [[64, 64, 64]]}},
        "model.high_resolution.grid: the canvas [64, 64, 64] has to be a height and a width, such as [336, 672]",
    ),
    (
        {"llm": None, "vision_tower": None, "start_from": {"llava": "x"}},
        "high_resolution is set together with start_from.llava",
    ),
    ({"high_resolution": None, "max_tiles": 2}, "model.max_tiles is 2, but the model has no tiles"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_settings_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = stage1_of_demo(tmp_path, tmp_path / "unused")
    content["model"] |= change
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        plan_model(check_recipe(content, "test").model)
    assert "\n" not in str(raised.value)


def test_a_siglip_is_refused(tmp_path: Path) -> None:
    content = stage1_of_demo(tmp_path, tmp_path / "unused")
    content["model"]["vision_tower"] = str(make_tower(tmp_path, "siglip"))
    with pytest.raises(
        UserError, match=r"model.high_resolution: model.vision_tower is a siglip_vision_model.*name a C"
    ):
        plan_model(check_recipe(content, "test").model)
