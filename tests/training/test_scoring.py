"""Scores during training: they do not affect it, and the test rows stay unread."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.evaluation.scoring import evaluate_run
from lora_llava.planning.run_plan import plan_run
from lora_llava.recipe.io import check_recipe
from lora_llava.splits.split_rows import sealed
from lora_llava.training import stages
from lora_llava.training.finetune import finetune
from tests.own_rows import asked, quiet, written


def weights(folder: str) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(folder).glob("*.safetensors")}


def test_scoring_during_training_changes_no_weight(
    stage2_content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage2_content["lora"]["dropout"] = 0.1  # draws at every step
    metrics = {}
    for name, more in (("without", {}), ("with", {"generate_every": 2, "generate_rows": 3})):
        content = stage2_content | {"output_dir": str(tmp_path / name)}
        content["evaluation"] = {"before": 0, "max_new_tokens": 4, **more}
        metrics[name] = finetune(check_recipe(content, "test"), Path(), console=quiet())
    assert weights(str(tmp_path / "with")) == weights(str(tmp_path / "without")) != {}
    assert metrics["with"]["train"]["loss_curve"] == metrics["without"]["train"]["loss_curve"]
    scores = metrics["with"]["train"]["curves"]["validation_score"]
    assert [step for step, _ in scores] == [2, 4]
    assert all(0 <= score <= 100 for _, score in scores)
    assert not metrics["without"]["train"]["curves"].get("validation_score")
    assert all(speed > 0 for _, speed in metrics["with"]["train"]["curves"]["tokens_per_second"])
    output = capsys.readouterr().err
    assert "step 2: accuracy" in output
    assert "of 3 validation rows" in output
    assert "Accuracy during training" in (tmp_path / "with" / "report.html").read_text()
    assert "Accuracy during training" not in (tmp_path / "without" / "report.html").read_text()


def test_validation_rows_are_scored_and_ranked_by_likelihood(
    stage2_content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [asked(number, answer=("Yes.", "No.")[number % 2]) for number in range(16)]
    for row in rows:
        row["choices"] = ["Yes.", "No."]
    content = stage2_content | {
        "data": {
            "format": "conversations",
            "path": written(tmp_path / "rows.json", rows),
            "max_length": 200,
            "validation_rows": 6,
            "system_prompt": "",
        },
        "evaluation": {"before": 0, "max_new_tokens": 4, "generate_every": 4, "generate_rows": 2},
    }
    metrics = finetune(check_recipe(content, "test"), Path(), console=quiet())
    assert [step for step, _ in metrics["train"]["curves"]["validation_score"]] == [4]
    assert "step 4: exact match" in capsys.readouterr().err
    assert main("evaluate", [str(content["output_dir"]), "--method", "loglik", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    lines = (Path(content["output_dir"]) / "predictions_loglik.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) == table["all"]["questions"] == 6
    assert set(texts) <= {"Yes.", "No."}
    assert table["all"]["exact_match"] > metrics["after"]["all"]["exact_match"]  # after 4 steps it writes no such thing


def test_rows_without_choices_are_refused_by_likelihood(
    stage2_content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = stage2_content | {
        "data": {
            "format": "conversations",
            "path": written(tmp_path / "rows.json", [asked(n) for n in range(8)]),
            "max_length": 200,
            "validation_rows": 2,
            "system_prompt": "",
        },
        "evaluation": {"before": 0, "after": 0},
        "training": stage2_content["training"] | {"max_steps": 1, "eval_every": None},
    }
    finetune(check_recipe(content, "test"), Path(), console=quiet())
    assert main("evaluate", [str(content["output_dir"]), "--method", "loglik"]) == 2
    assert "--method loglik: row r1 (rows.json, index 1) has no choices; add a list" in capsys.readouterr().err


def test_test_rows_are_not_read_while_training_runs(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_run(check_recipe(stage2_content, "test"))
    test = plan.splits["test"]
    with sealed(test):
        with pytest.raises(RuntimeError, match="test rows are read during training"):
            evaluate_run(None, plan, "after")
        assert plan.splits["validation"].read([0])
    assert test.read([0])

    class Peeking(stages.ScoreValidation):
        def __init__(self, plan: Any) -> None:
            super().__init__(plan)
            plan.splits["test"].read([0])

    stage2_content["evaluation"]["generate_every"] = 2
    monkeypatch.setattr(stages, "ScoreValidation", Peeking)
    with pytest.raises(RuntimeError, match="test rows are read during training"):
        finetune(check_recipe(stage2_content, "test"), Path(), console=quiet())


def test_an_empty_subset_is_refused(stage2_content: dict[str, Any]) -> None:
    stage2_content["evaluation"]["generate_every"] = 2
    stage2_content["data"]["splits"] = {"validation": None}
    with pytest.raises(UserError, match="generate_every needs validation rows, and the recipe has none"):
        check_recipe(stage2_content, "test")
