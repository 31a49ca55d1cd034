"""The Python API: what README shows, the same results and errors as the command line, no output when quiet."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lora_llava
from lora_llava import Model, Run, UserError, evaluate, finetune, load_model, load_recipe

THINGS = Path(__file__).parent / "earlier" / "things"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "things"
    shutil.copytree(THINGS, folder, ignore=shutil.ignore_patterns("run"))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    recipe = load_recipe(
        folder / "recipe.yaml", [f"data.path={folder}/questions.csv", f"data.image_folder={folder}/images"]
    )
    changes = {
        "output_dir": str(folder / "run"),
        "model.start_from": {"untrained": True},
        "lora.r": 2,
        "training.max_steps": 2,
    }
    return finetune(recipe, overrides=changes, quiet=True)


@pytest.fixture(scope="module")
def model(run: Run) -> Model:
    return load_model(run.path, quiet=True)


def test_finetune_returns_the_run(run: Run) -> None:
    assert json.loads(json.dumps(run.metrics)) == json.loads((run.path / "metrics.json").read_text())
    assert run.metrics["train"]["steps"] == 2


def test_evaluate_scores_all_rows_of_a_file(run: Run, folder: Path) -> None:
    table = evaluate(run.path, data=folder / "questions.csv", images=folder / "images", quiet=True)
    assert table["all"]["questions"] == 110
    assert evaluate(run.path, limit=3, quiet=True)["all"]["questions"] == 3


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"shuffle_images": True}, "evaluation_shuffled_limit2.json"),
        ({"base_only": True}, "evaluation_base_limit2.json"),
        ({"temperature": 0.5}, "evaluation_sampled_limit2.json"),
    ],
)
def test_options_reach_the_evaluation(run: Run, tmp_path: Path, options: dict[str, Any], name: str) -> None:
    evaluate(run.path, limit=2, output=tmp_path, quiet=True, **options)
    assert name in [file.name for file in tmp_path.iterdir()]


def test_data_is_found_from_the_working_directory(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "images" / "01.png", tmp_path)
    (tmp_path / "test.csv").write_text("image,question,answer\n01.png,How many shapes are there?,two\n")
    assert evaluate(run.path, data="test.csv", output=tmp_path, quiet=True)["all"]["questions"] == 1
    with pytest.raises(UserError, match=r"--data: .*missing\.csv is missing"):
        evaluate(run.path, data="missing.csv", quiet=True)


def test_what_is_not_an_image_is_reported(model: Model) -> None:
    with pytest.raises(UserError, match="image: int is not an image; give a path or a PIL image"):
        model.answer("What?", 3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"image nope\.png is missing"):
        model.answer("What?", "nope.png")


def test_a_model_answers_with_and_without_an_image(model: Model, folder: Path) -> None:
    file = folder / "images" / "01.png"
    by_file = model.answer("What is shown?", file, max_new_tokens=8)
    with Image.open(file) as image:
        assert model.answer("What is shown?", image, max_new_tokens=8) == by_file
    assert model.answer("What is shown?", [str(file)], max_new_tokens=8) == by_file
    assert isinstance(model.answer("What is a circle?", max_new_tokens=4), str)


def test_mistakes_are_exceptions(folder: Path) -> None:
    with pytest.raises(UserError, match="no such recipe"):
        finetune("nothing.yaml")
    with pytest.raises(UserError, match=r"training\.max_step is not a key"):
        finetune(folder / "recipe.yaml", overrides={"training.max_step": 3}, quiet=True)
    with pytest.raises(UserError, match="neither a finished run"):
        load_model(folder, quiet=True)
    with pytest.raises(UserError, match="method: 'vote' is unknown; use generate or loglik"):
        evaluate(folder, method="vote", quiet=True)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = lora_llava.train


def test_quiet_prints_nothing(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    evaluate(run.path, limit=2, output=run.path.parent / "answers", quiet=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "module", ["lora_llava", "lora_llava.data", "lora_llava.recipe", "lora_llava.evaluation.judge"]
)
def test_every_public_name_exists(module: str) -> None:
    found = import_module(module)
    assert [name for name in found.__all__ if not hasattr(found, name)] == []


def test_importing_the_package_is_fast_and_silent() -> None:
    code = "import sys, lora_llava, lora_llava.api; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")
