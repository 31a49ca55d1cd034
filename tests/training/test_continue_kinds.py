"""Continued runs of every kind of adapter, of ScienceQA, and of a model with a chat template of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_llava.planning.run_plan import plan_run
from lora_llava.recipe.io import check_recipe, load_recipe
from lora_llava.training import finetune
from tests.model.small_families import make_tower
from tests.own_rows import asked
from tests.training.continued import project, saved
from tests.training.small_pairs import make_model
from tests.training.small_runs import run, same, weights

MORE = pytest.mark.more
KINDS: dict[str, dict[str, Any]] = {
    "eva": {"lora": {"r": 4, "init": "eva"}},
    "new tokens": {"lora": {"r": 2}, "model": {"new_tokens": ["<a>", "<b>"]}},
    "head": {"lora": {"r": 2, "modules_to_save": ["lm_head", "embed_tokens"]}},
    "vision": {"lora": {"r": 2, "vision": {"r": 4}}},
    "dora": {"lora": {"r": 2, "dora": True, "rslora": True, "targets": ["q_proj", "v_proj"]}},
    "loftq": {"lora": {"r": 2, "init": "loftq"}},
    "orthogonal, not quantized": {"lora": {"r": 2, "init": "orthogonal"}, "model": {"quantization": "none"}},
}


def rows_in(folder: Path, start: int) -> list[dict[str, Any]]:
    return [asked(n, saved(n, folder / "images" / f"{n}.png")) for n in range(start, start + 12)]


def bare(model: dict[str, Any]) -> dict[str, Any]:
    return {"stage": 2, "model": model, "training": {"batch_size": 4, "learning_rate": 1e-2, "max_steps": 2}}


@pytest.mark.parametrize("kind", [pytest.param(name, marks=() if name == "new tokens" else MORE) for name in KINDS])
def test_every_kind_of_adapter_is_continued(
    kind: str, stage2_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    content = bare(stage2_content["model"] | KINDS[kind].get("model", {})) | {"lora": KINDS[kind]["lora"]}
    run(load_recipe(project(first, content, rows_in(first, 0))))
    train = finetune.train

    def look(plan: Any, base: Any, model: Any, *rest: Any) -> Any:
        model.save_pretrained(tmp_path / "start", save_embedding_layers=False)
        return train(plan, base, model, *rest)

    monkeypatch.setattr(finetune, "train", look)
    recipe = load_recipe(project(second, bare({"start_from": {"run": str(first / "run")}}), rows_in(second, 50)))
    run(recipe)
    assert same(weights(tmp_path / "start"), weights(first / "run"))
    before, after = (weights(folder / "run") for folder in (first, second))
    assert before.keys() == after.keys()
    assert not same(before, after)
    assert recipe.lora == load_recipe(first / "run" / "recipe.yaml").lora
    records = [json.loads((folder / "run" / "run.json").read_text()) for folder in (first, second)]
    assert records[0]["base"] == records[1]["base"]
    assert records[0].get("needs_base") == records[1].get("needs_base")


def test_scienceqa_keeps_its_splits(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    """Its splits share images: a row that was held out stays, whatever images were trained."""
    stage2_content["training"] |= {"max_steps": 1}
    run(check_recipe(stage2_content | {"evaluation": None}, "test"))
    content = stage2_content | {"output_dir": f"{tmp_path}/again"}
    content["model"] = {"start_from": {"run": str(tmp_path / "run")}}
    plan = plan_run(check_recipe(content | {"evaluation": None}, "test"))
    assert {name: len(split.rows) for name, split in plan.splits.items()} == {"train": 24, "validation": 6}
    assert plan.notes == ()


@pytest.mark.parametrize("name", ["qwen2", pytest.param("gemma3_text", marks=MORE)])
def test_a_models_own_template_is_recognised(name: str, tmp_path: Path) -> None:
    llm, tower = make_model(tmp_path / "llm", name), make_tower(tmp_path / "tower", "siglip")
    model = {"llm": str(llm), "vision_tower": str(tower), "start_from": {"untrained": True}}
    first, second = tmp_path / "first", tmp_path / "second"
    rows = [row | {"image": row["image"]} for row in rows_in(first, 0)]
    run(load_recipe(project(first, bare(model) | {"lora": {"r": 2}}, rows)))
    recipe = project(second, bare({"start_from": {"run": str(first / "run")}}), rows_in(second, 50))
    plan = plan_run(load_recipe(recipe))
    assert plan.processor.chat_template == (first / "run" / "chat_template.jinja").read_text()
    assert len(plan.splits["train"].rows) == 12
