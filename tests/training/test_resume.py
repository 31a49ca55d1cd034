"""Resume with the same recipe, or with changes accepted by name."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import Timeout
from rich.console import Console
from safetensors.torch import load_file

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.evaluation.scoring import evaluate_run
from lora_llava.recipe import Recipe, dump_recipe
from lora_llava.recipe.io import check_recipe
from lora_llava.runs.directory import only_run
from lora_llava.runs.resume import ACCEPTABLE, PLACES, UNTOUCHED, check_changes, leaves, moved_places
from lora_llava.training.finetune import finetune
from lora_llava.training.trainer_arguments import describe_determinism, determinism
from tests.ends import act_at
from tests.training.small_runs import PulledPlugError, pull_plug, recipe_of, run, same, weights

OTHERS: dict[type, Any] = {
    bool: lambda v: not v,
    int: lambda v: v + 1,
    float: lambda v: v / 2 + 0.01,
    str: lambda v: v + "x",
}


def changed_in(recipe: Recipe, key: str) -> Recipe:
    """Return the recipe with another value at one key, valid or not."""
    *path, name = key.split(".")
    sections: list[Any] = [recipe]
    for part in path:
        sections.append(getattr(sections[-1], part))
    value = getattr(sections[-1], name)
    other = OTHERS[type(value)](value) if type(value) in OTHERS else "other" if value is None else [value]
    changed = sections[-1].model_copy(update={name: other})
    for part, section in zip(reversed(path), reversed(sections[:-1]), strict=True):
        changed = section.model_copy(update={part: changed})
    return changed  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:Pydantic serializer:UserWarning")  # of values that no recipe could have
def test_every_changed_key_is_refused_acceptable_or_without_effect(stage2_content: dict[str, Any]) -> None:
    recipe = check_recipe(stage2_content, "test")
    keys = [key for key in leaves(recipe) if not key.startswith("data.columns")]
    assert len(keys) > 60
    unset = {key for key in ACCEPTABLE if key.startswith("training.early_stopping.")}  # the section is null here
    assert set(keys) >= (ACCEPTABLE - unset) | UNTOUCHED
    refused = []
    for key in keys:
        other = changed_in(recipe, key)
        if key in UNTOUCHED | PLACES:
            assert check_changes(recipe, other, (), 3) == ()
            assert [line.split()[0] for line in moved_places(recipe, other)] == [key] * (key in PLACES)
            continue
        refused.append(key)
        acceptable = key in ACCEPTABLE or key.startswith("evaluation.")
        with pytest.raises(UserError, match=r"^--resume: the recipe differs from that of step 3: ") as error:
            check_changes(recipe, other, (), 3)
        assert f" {key} was " in str(error.value)
        assert (f"--accept-changes {key}" in str(error.value)) == acceptable
        if acceptable:
            assert check_changes(recipe, other, (key,), 3) == (key,)
        else:
            with pytest.raises(UserError, match=f"--accept-changes: {key} cannot change within a run"):
                check_changes(recipe, other, (key,), 3)
    assert {"training.learning_rate", "lora.r", "seed", "data.max_length", "model.quantization"} <= set(refused)


def test_an_added_or_removed_section_is_a_change(stage2_content: dict[str, Any]) -> None:
    with_evaluation, without = (
        check_recipe(stage2_content, "test"),
        check_recipe(stage2_content | {"evaluation": None}, "test"),
    )
    with pytest.raises(UserError, match=r"evaluation.before was 'all' and is None.*, or --accept-changes evaluation$"):
        check_changes(with_evaluation, without, (), 3)
    keys = ("after", "batch_size", "before", "generate_rows", "max_new_tokens", "parser", "shuffled")
    assert check_changes(with_evaluation, without, ("evaluation",), 3) == tuple(f"evaluation.{key}" for key in keys)
    own = stage2_content | {"data": {"format": "conversations", "path": "a.json"}, "evaluation": None}
    with pytest.raises(UserError, match=r"data.format was 'scienceqa' and is 'conversations'"):
        check_changes(without, check_recipe(own, "test"), (), 3)


def curve(folder: Path, name: str) -> list[Any]:
    return list(json.loads((folder / "metrics.json").read_text())["train"]["curves"][name])


def test_another_learning_rate_takes_effect_only_if_accepted(
    stage2_content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage2_content["evaluation"] = None
    stage2_content["training"] |= {"max_steps": 6, "save_every": 3, "eval_every": 6, "lr_scheduler": "linear"}
    file = tmp_path / "recipe.yaml"

    def call(*arguments: str, rate: float = 0.006) -> tuple[int, str]:
        stage2_content["training"]["learning_rate"] = rate
        file.write_text(dump_recipe(check_recipe(stage2_content, "test")))
        code = main("finetune", [str(file), *arguments])
        _, found, message = capsys.readouterr().err.rpartition("error: ")  # behind what is left of a progress bar
        return code, (found + message).rstrip() if found else ""

    assert call() == (0, "")
    folder = Path(stage2_content["output_dir"])
    expected = load_file(folder / "adapter_model.safetensors")
    (folder / "run.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    code, message = call("--resume", rate=0.003)
    assert (code, message) == (
        2,
        "error: --resume: the recipe differs from that of step 3: training.learning_rate was 0.006 and is 0.003; undo "
        "that, or --accept-changes training.learning_rate",
    )
    code, message = call("--resume", "--accept-changes", "training.learning_rat", rate=0.003)
    assert (code, message) == (
        2,
        'error: --accept-changes: training.learning_rat cannot change within a run (did you mean "training.'
        'learning_rate"?)',
    )
    assert call("--resume", "--accept-changes", "training.learning_rate", rate=0.003) == (0, "")
    rates = dict(map(tuple, curve(folder, "learning_rate")))
    assert [rates[step] for step in (4, 5, 6)] == pytest.approx([0.003 * share / 5 for share in (3, 2, 1)])
    assert rates[3] == pytest.approx(0.006 * 4 / 5)
    found = load_file(folder / "adapter_model.safetensors")
    assert any(not expected[name].equal(found[name]) for name in expected)


def test_another_validation_interval_takes_effect_if_accepted(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(stage2_content, max_steps=8, eval_every=8, save_every=2, log_every=4)
    with monkeypatch.context() as patch:
        act_at(3, pull_plug, patch.setattr)
        with pytest.raises(PulledPlugError):
            run(recipe)
    recipe = recipe_of(stage2_content, eval_every=3, log_every=1)
    run(recipe, resume=True, accept_changes=["training.eval_every"])
    curves = json.loads((Path(recipe.output_dir) / "metrics.json").read_text())["train"]["loss_curve"]
    assert [step for step, _ in curves["validation"]] == [3, 6, 8]
    assert [step for step, _ in curves["train"]] == [3, 4, 5, 6, 7, 8]


def test_a_run_stopped_before_its_evaluation_is_unfinished(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = check_recipe(stage2_content, "test")
    with monkeypatch.context() as patch:
        patch.setattr("lora_llava.training.finetune.evaluate_run", ends_at("after"))
        with pytest.raises(KeyboardInterrupt):
            run(recipe)
    folder = Path(recipe.output_dir)
    expected = weights(folder)
    with pytest.raises(UserError, match="holds an unfinished run"):
        run(recipe)
    run(recipe, resume=True)
    assert same(weights(folder), expected)
    assert {"metrics.json", "report.html", "predictions_after.jsonl"} <= set(os.listdir(folder))
    with pytest.raises(UserError, match="holds a finished run"):
        run(recipe, resume=True)
    monkeypatch.setattr("lora_llava.training.finetune.evaluate_run", ends_at("before"))
    with pytest.raises(KeyboardInterrupt):
        run(recipe, overwrite=True)
    assert not {"metrics.json", "report.html", "predictions_after.jsonl", "run.json"} & set(os.listdir(folder))


def ends_at(table: str) -> Any:
    """Return an `evaluate_run` that raises Ctrl-C before or after training."""

    def evaluate_table(model: Any, plan: Any, when: str) -> Any:
        if when == table:
            raise KeyboardInterrupt
        return evaluate_run(model, plan, when)

    return evaluate_table


def test_errors_inside_the_lock_are_not_reported_as_errors_of_the_folder(tmp_path: Path) -> None:
    for error in (PermissionError(13, "Permission denied"), Timeout("other.lock")):
        with pytest.raises(type(error)), only_run(tmp_path):
            raise error
    with only_run(tmp_path):  # and the folder is free again
        pass


def test_overwrite_replaces_an_unfinished_stage_1_too(
    stage1_content: dict[str, Any], stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage1_content["training"] |= {"save_every": 1, "max_steps": 4}
    (tmp_path / "stage1.yaml").write_text(dump_recipe(check_recipe(stage1_content, "test")))
    stage2_content["model"]["start_from"] = {"stage1_recipe": "stage1.yaml"}
    recipe = recipe_of(stage2_content)
    with monkeypatch.context() as patch:
        act_at(3, pull_plug, patch.setattr)
        with pytest.raises(PulledPlugError):
            finetune(recipe, tmp_path, console=Console(file=io.StringIO()))
    finetune(recipe, tmp_path, overwrite=True, console=Console(file=io.StringIO()))
    assert (Path(recipe.output_dir) / "metrics.json").is_file()


def test_a_second_run_in_a_folder_is_refused_naming_the_first(stage2_content: dict[str, Any]) -> None:
    recipe = check_recipe(stage2_content, "test")
    message = (
        rf"output_dir: process {os.getpid()} on .*, since .*, is at work in .*/run; wait for it, or set output_dir="
    )
    with only_run(Path(recipe.output_dir)), pytest.raises(UserError, match=message):
        finetune(recipe, Path(), console=Console(file=io.StringIO()))


def test_a_folder_that_cannot_be_created_is_an_error(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = check_recipe(stage2_content | {"output_dir": str(tmp_path / "file" / "run")}, "test")
    with pytest.raises((UserError, NotADirectoryError)):
        finetune(recipe, Path(), console=Console(file=io.StringIO()))


def test_resume_and_overwrite_exclude_each_other(stage2: Recipe) -> None:
    with pytest.raises(UserError, match="use one of them"):
        finetune(stage2, Path(), resume=True, overwrite=True, console=Console(file=io.StringIO()))


def test_a_deterministic_run_uses_such_algorithms_until_its_end(
    stage2_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    seen = []
    act_at(1, lambda trainer: seen.append(torch.are_deterministic_algorithms_enabled()), monkeypatch.setattr)
    recipe = recipe_of(stage2_content, max_steps=1, eval_every=1, deterministic=True)
    run(recipe)
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with determinism(False):
        assert not torch.are_deterministic_algorithms_enabled()
    assert describe_determinism(recipe, resumed=True) is None  # a CPU's runs are equal without it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(describe_determinism(recipe, resumed=False)).startswith("deterministic: equal bit for bit")
    loose = recipe_of(stage2_content, deterministic=False)
    assert describe_determinism(loose, resumed=False) is None
    assert "equals an unbroken one up to rounding" in str(describe_determinism(loose, resumed=True))
