"""The command line: help, and one line with exit code 2 for each mistake."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_llava.commands.main import VERBS, main, verb_module
from lora_llava.demo.build import CLIP_STEPS, LLM_STEPS

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def recipe_file(stage2_content: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(stage2_content))
    return file


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a verb that must fail with exit code 2, and return its one line."""
    capsys.readouterr()
    assert main(None, list(argv)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.batch_sise=3", 'training.batch_sise is not a key of a recipe (did you mean "batch_size"?)'),
        ("training.learning_rate=fast", "training.learning_rate is 'fast'; it should be a valid number"),
        ("training.batch_size=2.5", "training.batch_size is 2.5; it should be a valid integer"),
        ("data.path=/nowhere", "split 'train', cannot be read"),
        ("data.splits.train=trian", "no split 'trian' (did you mean \"train\"?)"),
        ("data.max_length=40", "over data.max_length 40"),
        ("data.max_length=4096", "data.max_length is 4096, over the language model's 512 positions"),
        ("model.llm=./missing", "model.llm: the folder ./missing is missing"),
        ("model.llm=nobody/nothing", "nobody/nothing is not in the local cache and HF_HUB_OFFLINE is set"),
        ("training.report_to=[wandb]", "training.report_to: wandb is not installed"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_before_training(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], override: str, expected: str, tmp_path: Path
) -> None:
    assert expected in error_of(capsys, "finetune", str(recipe_file), override)
    assert not (tmp_path / "run").exists()


def test_learning_rate_of_2e_5_is_a_number(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(None, ["finetune", str(recipe_file), "--dry-run", "training.learning_rate=2e-5"]) == 0
    assert "one sample" in capsys.readouterr().out


def test_a_corrupt_image_names_its_row_or_is_dropped_and_counted(
    stage2_content: dict[str, Any], scienceqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    data = tmp_path / "data"
    shutil.copytree(scienceqa, data)
    (data / "images" / "train" / "1" / "image.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (data / "images" / "train" / "3" / "image.png").unlink()
    stage2_content["data"]["path"] = str(data)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(stage2_content))
    message = error_of(capsys, "finetune", str(file))
    assert "row 1: image train/1/image.png cannot be read" in message
    assert "data.on_bad_image=drop" in message
    assert main(None, ["finetune", str(file), "--dry-run", "data.on_bad_image=drop"]) == 0
    assert "2 bad image" in capsys.readouterr().out


def test_a_row_without_answer_is_named(
    stage2_content: dict[str, Any], captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads(captions.read_text())
    rows[2]["conversations"][1]["value"] = " "
    broken = tmp_path / "chat.json"
    broken.write_text(json.dumps(rows))
    stage2_content |= {"stage": 1, "lora": None, "evaluation": None}
    stage2_content["data"] = {
        "format": "captions",
        "path": str(broken),
        "image_folder": str(captions.parent / "images"),
        "template": "plain",
        "max_length": 400,
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(stage2_content))
    assert "row 2 (chat.json, index 2): turn 1: the answer is empty" in error_of(capsys, "finetune", str(file))
    rows[2]["conversations"][1]["value"] = "a caption."
    rows[2]["conversations"][0]["value"] = "<image> <image>"
    broken.write_text(json.dumps(rows))
    assert "row 2 (chat.json, index 2): 2 <image> placeholders for 1 images" in error_of(capsys, "finetune", str(file))


def test_bitsandbytes_that_cannot_run_is_reported(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    message = error_of(capsys, "finetune", str(recipe_file))
    assert "bitsandbytes cannot run here" in message
    assert "set model.quantization=none" in message


def test_evaluate_rejects_a_folder_that_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a finished run" in error_of(capsys, "evaluate", str(tmp_path))


def test_unknown_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert 'did you mean "demo_align.yaml"?' in error_of(capsys, "finetune", "demo_aling.yaml")


@pytest.mark.parametrize("verb", list(VERBS))
def test_help_of_every_verb_ends_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(None, [verb, "--help"])
    examples = capsys.readouterr().out.rpartition("examples:\n")[2].splitlines()
    assert len(examples) in (2, 3)
    assert all(line.startswith(f"  lora-llava {verb} ") or line == f"  lora-llava {verb}" for line in examples)


@pytest.mark.parametrize("argv", [[], *([verb] for verb in VERBS), ["score", "scienceqa"], ["score", "llava-bench"]])
def test_help_fits_into_80_columns(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(None, [*argv, "--help"])
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_flag_has_help_with_its_default(verb: str) -> None:
    parser = argparse.ArgumentParser()
    verb_module(verb).add_arguments(parser)
    for action in parser._actions:
        flag = ", ".join(action.option_strings)
        if not flag or action.nargs == 0:  # a positional argument or a switch
            continue
        assert action.help, flag
        shown = any(word in action.help for word in ("default", "required")) or action.default is not None
        assert shown, f"{verb} {flag}"


def test_the_demo_s_default_steps_are_those_of_its_build() -> None:
    parser = argparse.ArgumentParser()
    verb_module("build-demo").add_arguments(parser)
    shown = parser.format_help()
    assert f"default: {LLM_STEPS}" in shown
    assert f"default: {CLIP_STEPS}" in shown


@pytest.mark.parametrize("script", ["finetune", "evaluate", "merge", "push", "benchmark"])
def test_scripts_run_their_verb(script: str) -> None:
    file = REPOSITORY / "scripts" / f"{script}.py"
    result = subprocess.run([sys.executable, file, "--help"], capture_output=True, text=True, check=True)
    assert f"lora-llava {script}" in result.stdout


def test_the_overview_groups_all_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(None, ["--help"])
    assert error.value.code == 0
    shown = capsys.readouterr().out
    assert [verb for verb in VERBS if f"\n  {verb} " not in shown] == []
    assert shown.index("prepare:") < shown.index("train:") < shown.index("use:") < shown.index("share:")


def test_a_mistyped_verb_or_flag_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, meant in ((["finetun"], "finetune"), (["evaluate", "run", "--shuffle-image"], "--shuffle-images")):
        with pytest.raises(SystemExit) as error:
            main(None, argv)
        assert error.value.code == 2
        assert f"did you mean {meant}?" in capsys.readouterr().err


def test_an_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(None, ["finetune", "demo_align.yaml", "--dry"])
    assert error.value.code == 2


def test_a_count_below_one_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(None, ["evaluate", "run", "--limit", "-3"])
    assert error.value.code == 2
    assert "--limit: -3 should be 1 or more" in capsys.readouterr().err


def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    message = error_of(capsys, "recipes", "--copy", str(tmp_path / "file" / "below"))
    assert message == f"error: {tmp_path / 'file' / 'below'}: Not a directory; choose another path"


def test_recipes_are_listed_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(None, ["recipes"]) == 0
    assert "demo_scienceqa_qlora.yaml" in capsys.readouterr().out
    assert main(None, ["recipes", "--copy", str(tmp_path)]) == 0
    assert (tmp_path / "demo_align.yaml").read_bytes() == (REPOSITORY / "recipes" / "demo_align.yaml").read_bytes()
    assert (tmp_path / "schema.json").is_file()
