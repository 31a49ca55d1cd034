"""Evaluations of a LLaVA-1.6: the tiles of a run are those it was trained with, whatever the recipe with the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_llava import evaluate
from lora_llava.core.errors import UserError
from lora_llava.planning.plan_tables import print_data
from lora_llava.planning.run_plan import plan_run
from lora_llava.prepare.row_check import check
from lora_llava.recipe.io import check_recipe
from tests.own_rows import asked, quiet, written
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


def test_rows_longer_than_the_model_s_positions_are_named(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content["model"].pop("max_tiles")
    run(check_recipe(content, "test"))
    rows = [asked(number, "a.png") | {"image": ["a.png"] * count} for number, count in ((20, 1), (21, 6))]
    rows[1]["conversations"][0]["value"] = "<image>\n" * 6 + "Which?"
    file = written(tmp_path / "rows" / "long.json", rows)
    evaluate(tmp_path / "low", data=file)
    message = "warning: 1 of 2 rows are longer than the language model's 512 positions"
    assert message in (said := " ".join(capsys.readouterr().err.split()))
    assert "its images alone have 528 tokens: the row fits with model.max_tiles=3" in said
    content["data"] |= {"test_rows": 0, "test_source": {"path": file, "format": "conversations"}}
    report = check(check_recipe(content, "test"), console=quiet())
    [found] = [each for each in report.warnings if each.kind == "over the positions"]
    assert found.row == "r21"
    assert "over the language model's 512 positions; leave it out; its images alone have 528" in found.message
    console = quiet()
    print_data(plan_run(check_recipe(content, "test")), console)
    assert f"warning: test: {message.removeprefix('warning: ')}" in console.file.getvalue()  # type: ignore[attr-defined]
