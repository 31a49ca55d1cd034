"""Two processes over gloo match one: losses, adapter, answers; and only one of them writes and prints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_llava.core.errors import UserError
from lora_llava.recipe.io import check_recipe
from tests.training.small_runs import content_for_ranks, launch, one_and_two, run, same, weights


@pytest.fixture(scope="module")
def content(parts: Path, scienceqa: Path) -> dict[str, Any]:
    return content_for_ranks(parts, scienceqa) | {"evaluation": {"max_new_tokens": 4, "batch_size": 2}}


@pytest.fixture(scope="module")
def runs(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Run directories of one rank and of two, with equally many samples per step, and the output of the two."""
    return one_and_two(content, tmp_path_factory.mktemp("ranks"), torchrun=True)


def read(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "metrics.json").read_text()))


def test_two_ranks_have_the_losses_of_one(runs: tuple[Path, Path, str]) -> None:
    one, two = (read(run)["train"]["loss_curve"] for run in runs[:2])
    assert [len(one[kind]) for kind in ("train", "validation")] == [6, 2]
    for kind in one:
        assert [step for step, _ in two[kind]] == [step for step, _ in one[kind]]
        assert [loss for _, loss in two[kind]] == pytest.approx([loss for _, loss in one[kind]], abs=1e-5)


def test_two_ranks_train_the_adapter_of_one(runs: tuple[Path, Path, str]) -> None:
    one, two = (weights(each) for each in runs[:2])
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    assert any("multi_modal_projector" in name for name in one)


def test_tokens_are_counted_over_both_ranks(runs: tuple[Path, Path, str]) -> None:
    one, two = (read(run)["train"] for run in runs[:2])
    assert [two[name] for name in ("tokens", "supervised_tokens", "steps")] == [
        one[name] for name in ("tokens", "supervised_tokens", "steps")
    ]


def test_both_ranks_answer_and_every_answer_is_there_once(runs: tuple[Path, Path, str]) -> None:
    for name in ("predictions_before.jsonl", "predictions_after.jsonl"):
        one, two = ([json.loads(line) for line in (run / name).read_text().splitlines()] for run in runs[:2])
        assert len(one) == 6
        assert [row["question_id"] for row in two] == [row["question_id"] for row in one]
    assert (runs[0] / "predictions_before.jsonl").read_bytes() == (runs[1] / "predictions_before.jsonl").read_bytes()


def test_only_one_rank_prints_and_writes(runs: tuple[Path, Path, str]) -> None:
    _, two, output = runs
    assert output.count("trained 6 steps") == 1
    assert output.count("step 3: validation loss") == 1
    assert output.count("Freeze plan") == 1
    assert sorted(file.name for file in (two / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.more
def test_an_error_is_printed_once_without_our_traceback(content: dict[str, Any], tmp_path: Path) -> None:
    wrong = content | {"data": content["data"] | {"path": str(tmp_path / "nowhere")}}
    result = launch(wrong, tmp_path / "run", torchrun=True)
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1
    assert 'finetune.py", line' not in result.stderr


def test_two_stopped_ranks_resume_exactly(
    content: dict[str, Any], runs: tuple[Path, Path, str], tmp_path: Path
) -> None:
    """Remove the last three steps of a finished run; one process may not resume it."""
    folder = tmp_path / "two"
    shutil.copytree(runs[1], folder)
    (folder / "run.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    message = "was written by a run of 2 processes, and now there are 1; start as many"
    with pytest.raises(UserError, match=message):
        run(check_recipe(content | {"output_dir": str(folder)}, "test"), resume=True)
    assert launch(content, folder, "--resume").returncode == 0
    assert same(weights(folder), weights(runs[1]))
    for key in ("loss_curve", "tokens", "supervised_tokens"):
        assert read(folder)["train"][key] == read(runs[1])["train"][key], key
