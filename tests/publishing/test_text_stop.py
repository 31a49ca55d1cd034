"""Templates whose stop is ordinary text: stock generation stops there, using the exported folder's config."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import LlavaConfig, pipeline

from lora_llava.publishing.card.snippet import loading_snippet
from lora_llava.publishing.import_llava import _save_processor
from lora_llava.publishing.merge import merge
from lora_llava.publishing.package import Package
from lora_llava.recipe.io import check_recipe
from lora_llava.training.finetune import finetune

QUIET = Console(file=io.StringIO(), width=160)


@pytest.fixture(scope="module")
def merged(parts: Path, scienceqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and merge a model with `vicuna_v0` until it writes its stop immediately."""
    folder = tmp_path_factory.mktemp("v0")
    content: dict[str, Any] = {
        "stage": 2,
        "output_dir": str(folder / "run"),
        "model": {
            "llm": str(parts / "llm"),
            "vision_tower": str(parts / "vision_tower"),
            "start_from": {"untrained": True},
            "quantization": "none",
        },
        "lora": {"r": 4, "alpha": 8},
        "data": {
            "format": "scienceqa",
            "path": str(scienceqa),
            "template": "vicuna_v0",
            "max_length": 400,
            "splits": {"test": None},
            "system_prompt": "",
        },
        "training": {"batch_size": 8, "learning_rate": 0.03, "max_steps": 30, "log_every": 10},
    }
    finetune(check_recipe(content, "test"), Path(), console=QUIET)
    merge(folder / "run", folder / "merged", prompts=1, console=QUIET)
    return folder / "merged"


def read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "generation_config.json").read_text()))


def test_run_and_merged_model_name_the_stop(merged: Path) -> None:
    assert read(merged.parent / "run")["stop_strings"] == ["###"]
    assert read(merged)["stop_strings"] == ["###"]


def test_the_card_s_pipeline_call_stops(merged: Path) -> None:
    call = loading_snippet(Package(merged, "model", {}), "me/v0")
    assert 'stop_sequence="###"' in call
    pipe = pipeline("image-text-to-text", model=str(merged))
    messages = [{"role": "user", "content": [{"type": "text", "text": "Which colour is shown?"}]}]
    (answer,) = pipe(text=messages, max_new_tokens=80, do_sample=False, return_full_text=False, stop_sequence="###")
    assert answer["generated_text"].endswith("###")
    assert answer["generated_text"].count("###") == 1


@pytest.mark.parametrize(("template", "stops"), [("vicuna_v0", ["###"]), ("plain", ["\n"]), ("vicuna_v1", None)])
def test_an_imported_model_names_its_template_s_stop(
    merged: Path, tmp_path: Path, template: str, stops: list[str] | None
) -> None:
    _save_processor(tmp_path, LlavaConfig.from_pretrained(merged), merged, merged, "pad", template)
    assert read(tmp_path).get("stop_strings") == stops


def test_a_card_for_vicuna_v1_has_no_stop(merged: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{}")
    assert not re.search("stop_s", loading_snippet(Package(tmp_path, "model", {}), "me/v1"))
