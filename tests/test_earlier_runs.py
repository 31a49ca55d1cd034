"""A run, a checkpoint and predictions of an earlier version (`tests/earlier`) still evaluate, merge, compare, resume.

They were made by `lora-llava init things --example --model demo` and, inside that folder, `lora-llava finetune
recipe.yaml output_dir=run model.start_from={untrained: true} lora.r=2 lora.alpha=4 training.max_steps=4
training.save_every=2`, before "pictures" in saved files became "images".
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_llava import evaluate, finetune, load_recipe, merge
from lora_llava.commands.main import main

EARLIER = Path(__file__).parent / "earlier" / "things"


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the earlier folder, with the paths of this machine in its recipe."""
    folder = tmp_path / "things"
    shutil.copytree(EARLIER, folder)
    monkeypatch.chdir(folder)
    recipe = folder / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("/tmp/fix/things", str(folder)))
    return folder


def test_an_earlier_run_evaluates_to_the_same_scores(things: Path) -> None:
    recorded = json.loads((things / "run" / "metrics.json").read_text())["after"]
    assert evaluate("run", quiet=True) == recorded
    new = [json.loads(line) for line in (things / "run" / "predictions.jsonl").read_text().splitlines()]
    old = [json.loads(line) for line in (things / "run" / "predictions_after.jsonl").read_text().splitlines()]
    assert [(line["question_id"], line["text"]) for line in new] == [
        (line["question_id"], line["text"]) for line in old
    ]


def test_an_earlier_run_merges(things: Path) -> None:
    report = merge("run", "merged", quiet=True)
    assert report["adapter_on_bf16_base"]["max_logit_difference"] <= report["tolerance"]
    assert (things / "merged" / "model.safetensors").is_file()


def test_earlier_predictions_are_compared(things: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("compare", ["run/predictions_before.jsonl", "run/predictions_after.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_an_earlier_checkpoint_resumes_to_the_same_weights(things: Path) -> None:
    recipe = load_recipe("run/recipe.yaml")
    expected = load_file("run/adapter_model.safetensors")
    for name in ("metrics.json", "adapter_model.safetensors", "run.json"):
        (things / "run" / name).unlink()
    finetune(recipe, resume=True, quiet=True)
    resumed = load_file("run/adapter_model.safetensors")
    assert resumed.keys() == expected.keys()
    for name, tensor in expected.items():  # to the bit with as many threads as then
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-5)
