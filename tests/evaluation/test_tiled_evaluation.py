"""Evaluations of a LLaVA-1.6: the tiles of a run are those it was trained with, whatever the recipe with the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_llava import evaluate
from lora_llava.core.errors import UserError
from lora_llava.recipe.io import check_recipe
from tests.training.small_runs import run
from tests.training.tiled_llava import GRID, tiled_content, tiled_llava, tiled_rows


@pytest.fixture
def content(stage2_content: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe that cuts images into two tiles, and the same with all tiles beside it as `high.yaml`."""
    rows = tiled_rows(tmp_path / "rows")
    found = tiled_content(stage2_content, tiled_llava(tmp_path / "llava"), rows, test_rows=2)
    found["training"] = {"learning_rate": 1e-3, "max_steps": 1, "batch_size": 2}
    found["evaluation"] = {"max_new_tokens": 2, "before": 0, "after": 0}
    (tmp_path / "high.yaml").write_text(yaml.safe_dump(found))
    return found | {"model": found["model"] | {"max_tiles": 2}, "output_dir": str(tmp_path / "low")}


def test_a_run_keeps_its_tiles_with_another_recipe(content: dict[str, Any], tmp_path: Path) -> None:
    run(check_recipe(content, "test"))
    high, folder = str(tmp_path / "high.yaml"), str(tmp_path / "low")

    def asked(suffix: str, **options: Any) -> tuple[list[str], dict[str, Any]]:
        out = tmp_path / suffix
        out.mkdir()
        evaluate(folder, quiet=True, output=out, **options)
        [predictions], [summary] = out.glob("predictions*.jsonl"), out.glob("evaluation*.json")
        return predictions.read_text().splitlines()[-2:], json.loads(summary.read_text())["asked"]

    own, about = asked("own")
    assert about["canvases"] == [list(canvas) for canvas in GRID[:2]]
    assert asked("other", recipe=high) == (own, about)
    assert asked("lifted", overrides=["model.max_tiles=null"])[1]["canvases"] == about["canvases"]
    assert asked("base", recipe=high, base_only=True)[1]["canvases"] == about["canvases"]
    with pytest.raises(UserError, match=r"model\.max_tiles is 3, but .*low was trained with fewer canvases"):
        evaluate(folder, quiet=True, overrides=["model.max_tiles=3"])


def test_a_run_may_be_asked_with_fewer_tiles(content: dict[str, Any], tmp_path: Path) -> None:
    content["model"].pop("max_tiles")
    run(check_recipe(content, "test"))
    evaluate(tmp_path / "low", quiet=True, overrides=["model.max_tiles=2"])
    [summary] = (tmp_path / "low").glob("evaluation*.json")
    assert json.loads(summary.read_text())["asked"]["canvases"] == [list(canvas) for canvas in GRID[:2]]
