"""Both stages, from recipe to run directory, on a small real model."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lora_llava.core.errors import UserError
from lora_llava.model.adapters import trained_projector
from lora_llava.model.start import prepare_base, read_run_projector
from lora_llava.planning.run_plan import RunPlan, plan_run
from lora_llava.recipe import Recipe
from lora_llava.recipe.io import check_recipe
from lora_llava.training.finetune import dry_run, finetune
from lora_llava.training.parameter_groups import Rates
from lora_llava.training.stages import build_feeds, build_trained_model, train, training_arguments
from lora_llava.training.trainer import LlavaSFTTrainer


def run(recipe: Recipe, folder: Path = Path(), **options: Any) -> tuple[dict[str, Any], str]:
    stream = io.StringIO()
    metrics = finetune(recipe, folder, console=Console(file=stream, width=160), **options)
    return metrics, stream.getvalue()


def frozen_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.fixture
def trained(stage2: Recipe) -> tuple[RunPlan, Any, dict[str, torch.Tensor], Any]:
    """A plan, the model before and after training on it, and the result."""
    plan = plan_run(stage2)
    base = prepare_base(stage2.model, stage2.seed)
    Path(stage2.output_dir).mkdir()
    model = build_trained_model(stage2, base)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = train(plan, base, model)
    return plan, model, before, result


def test_frozen_weights_stay_bit_identical_and_trained_ones_move(trained: Any) -> None:
    _, model, before, _ = trained
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, before[name]), f"{name} did not train"
        else:
            assert torch.equal(parameter, before[name]), f"{name} changed"


def test_projector_and_adapters_train_in_float32(trained: Any) -> None:
    _, model, _, _ = trained
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}


def test_the_run_has_the_weights_with_the_best_validation_loss(trained: Any, stage2: Recipe) -> None:
    _plan, _, _, result = trained
    folder = Path(stage2.output_dir)
    steps = sorted(int(p.name.split("-")[1]) for p in (folder / "checkpoints").iterdir())
    assert steps == [2, 4]
    state = json.loads((folder / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(losses, key=lambda step: losses[step])
    saved = load_file(folder / "adapter_model.safetensors")
    checkpoint = load_file(folder / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert saved.keys() == checkpoint.keys()
    assert all(torch.equal(saved[name], checkpoint[name]) for name in saved)
    assert result.best_validation_loss == losses[best]
    assert any("multi_modal_projector" in name for name in checkpoint)
    assert not list(folder.rglob("training_args.bin"))


def test_counts_of_tokens_are_those_of_the_rows(trained: Any) -> None:
    plan, _, _, result = trained
    rows = plan.splits["train"].rows
    assert len(rows) == 24
    assert result.steps == 4
    assert 0 < result.supervised_tokens < result.tokens
    assert result.tokens < 16 * plan.splits["train"].report.longest + 1


def test_stock_peft_gives_the_same_logits_without_this_package(trained: Any, stage2: Recipe, tmp_path: Path) -> None:
    plan, model, _, _ = trained
    row = next(row for row in plan.splits["train"].rows if row["image_files"])
    image = plan.splits["train"].images.open(row["image_files"][0])
    pixels = plan.processor.image_processor([image], return_tensors="pt")["pixel_values"]
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        ours = model.eval()(input_ids=ids, pixel_values=pixels, use_cache=False).logits
    torch.save({"ids": ids, "pixels": pixels}, tmp_path / "batch.pt")
    script = (
        "import sys, json, torch\n"
        "sys.modules['lora_llava'] = None\n"
        "from peft import PeftModel\n"
        "from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration\n"
        "run, batch, out = sys.argv[1:]\n"
        "base = json.load(open(run + '/adapter_config.json'))['base_model_name_or_path']\n"
        "skip = ['model.multi_modal_projector', 'model.vision_tower', 'lm_head']\n"
        "nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True,\n"
        "    bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=skip)\n"
        "model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32, quantization_config=nf4)\n"
        "for module in model.modules():\n"
        "    if hasattr(module, 'support_avx512bf16_for_cpu'): module.support_avx512bf16_for_cpu = False\n"
        "model = PeftModel.from_pretrained(model, run).eval()\n"
        "batch = torch.load(batch)\n"
        "with torch.no_grad():\n"
        "    logits = model(input_ids=batch['ids'], pixel_values=batch['pixels'], use_cache=False).logits\n"
        "torch.save(logits, out)\n"
    )
    command = [sys.executable, "-c", script, stage2.output_dir, str(tmp_path / "batch.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), ours, rtol=0, atol=1e-5)


def test_exported_processor_gives_the_trained_prompt(trained: Any, stage2: Recipe) -> None:
    plan, _, _, _ = trained
    processor = AutoProcessor.from_pretrained(stage2.output_dir)
    split = plan.splits["train"]
    row = next(i for i, row in enumerate(split.rows) if row["image_files"])
    conversation = split.read([row])[0]
    image = split.images.open(conversation.images[0])
    text = conversation.turns[0].text.removeprefix("<image>\n")
    parts = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    prompt = batch["input_ids"][0].tolist()
    labels = split.rows[row]["labels"]
    assert split.rows[row]["input_ids"][: len(prompt)] == prompt
    assert labels[: len(prompt)] == [-100] * len(prompt)
    assert -100 not in labels[len(prompt) :]


def test_two_learning_rates_and_decay_of_matrices_only(stage2_content: dict[str, Any]) -> None:
    stage2_content["training"] |= {"projector_learning_rate": 1e-4, "weight_decay": 0.1}
    recipe = check_recipe(stage2_content, "test")
    plan = plan_run(recipe)
    model = build_trained_model(recipe, prepare_base(recipe.model, 0))
    trainer = LlavaSFTTrainer(
        model,
        training_arguments(recipe, 4, False, 1),
        train=build_feeds(plan)[0],
        validation=None,
        processor=plan.processor,
        rates=Rates(adapters=5e-3, projector=1e-4),
        callbacks=[],
    )
    groups = [(g["lr"], g["weight_decay"], len(g["params"])) for g in trainer.create_optimizer().param_groups]
    assert sorted(groups) == [(1e-4, 0.0, 2), (1e-4, 0.1, 2), (5e-3, 0.1, 2 * 7 * 2)]


def test_finetune_prints_and_writes_everything(stage2: Recipe) -> None:
    metrics, output = run(stage2)
    folder = Path(stage2.output_dir)
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert set(metrics) >= {"before", "after", "train", "model", "versions"}
    assert set(metrics["train"]) >= {"seconds", "tokens", "supervised_tokens", "peak_memory_bytes"}
    for when in ("before", "after"):
        table = metrics[when]
        assert list(table) == ["AVG", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "unparsed"]
        assert table["AVG"][2] == 6
        predictions = [json.loads(line) for line in (folder / f"predictions_{when}.jsonl").read_text().splitlines()]
        assert [p["question_id"] for p in predictions] == ["31", "32", "33", "34", "35", "36"]
    assert "Freeze plan" in output
    assert "peak memory" in output


def test_stage_2_starts_from_the_projector_of_stage_1(stage1: Recipe, stage2_content: dict[str, Any]) -> None:
    run(stage1)
    stage2_content["model"]["start_from"] = {"stage1_run": stage1.output_dir}
    recipe = check_recipe(stage2_content, "test")
    base = prepare_base(recipe.model, recipe.seed)
    model = build_trained_model(recipe, base)
    trained = read_run_projector(Path(stage1.output_dir))
    projector = trained_projector(model).state_dict()
    assert projector.keys() == trained.keys()
    assert all(torch.equal(projector[name], trained[name]) for name in trained)
    fresh = LlavaForConditionalGeneration.from_pretrained(base.name).model.multi_modal_projector.state_dict()
    assert not torch.equal(fresh["linear_1.weight"].float(), trained["linear_1.weight"])


def test_a_stage_1_run_loads_in_stock_peft(stage1: Recipe) -> None:
    run(stage1)
    config = json.loads((Path(stage1.output_dir) / "adapter_config.json").read_text())
    base = LlavaForConditionalGeneration.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, stage1.output_dir)
    trained = read_run_projector(Path(stage1.output_dir))
    loaded = trained_projector(model).state_dict()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)


def test_a_stage_1_recipe_is_run_first_and_only_once(
    stage1_content: dict[str, Any], stage2_content: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "align.yaml").write_text(json.dumps(stage1_content))  # JSON is YAML
    stage2_content["model"]["start_from"] = {"stage1_recipe": "align.yaml"}
    stage2_content["evaluation"] = None
    _, output = run(check_recipe(stage2_content, "test"), tmp_path)
    assert "Stage 1" in output
    written = (tmp_path / "stage1" / "run.json").stat().st_mtime_ns
    stage2_content["output_dir"] = str(tmp_path / "second")
    _, output = run(check_recipe(stage2_content, "test"), tmp_path)
    assert "Stage 1" not in output
    assert (tmp_path / "stage1" / "run.json").stat().st_mtime_ns == written
    stage1_content["training"]["max_steps"] = 2
    (tmp_path / "align.yaml").write_text(json.dumps(stage1_content))
    stage2_content["output_dir"] = str(tmp_path / "third")
    with pytest.raises(UserError, match="was trained with another Stage 1 recipe"):
        run(check_recipe(stage2_content, "test"), tmp_path)


def test_a_stage_1_run_of_another_base_is_refused(
    stage1: Recipe, stage2_content: dict[str, Any], tmp_path: Path
) -> None:
    run(stage1)
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(str(stage1.model.llm)).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "model.safetensors")
    from safetensors.torch import save_file

    save_file({name: t + 1 for name, t in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    stage2_content["model"] |= {"llm": str(other), "start_from": {"stage1_run": stage1.output_dir}}
    with pytest.raises(UserError, match="was trained on another llm"):
        run(check_recipe(stage2_content, "test"))


def test_a_complete_llava_needs_no_stage_1(stage2: Recipe, stage2_content: dict[str, Any], tmp_path: Path) -> None:
    base = prepare_base(stage2.model, 0).name
    stage2_content["model"] = {"start_from": {"llava": base}}
    recipe = check_recipe(stage2_content, "test")
    run(recipe)
    config = json.loads((Path(recipe.output_dir) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base


def test_a_finished_run_is_not_overwritten_automatically(stage1: Recipe) -> None:
    run(stage1)
    with pytest.raises(UserError, match="holds a finished run"):
        run(stage1)
    run(stage1, overwrite=True)
    (Path(stage1.output_dir) / "run.json").unlink()
    with pytest.raises(UserError, match="holds an unfinished run, with checkpoint-"):
        run(stage1)


def test_resume_continues_from_the_newest_checkpoint(stage2_content: dict[str, Any]) -> None:
    stage2_content["evaluation"] = None
    complete = check_recipe(stage2_content, "test")
    run(complete)
    folder = Path(complete.output_dir)
    expected = load_file(folder / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors")
    (folder / "run.json").unlink()
    import shutil

    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    run(complete, resume=True)
    resumed = load_file(folder / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_nothing_to_resume_is_an_error(stage2: Recipe) -> None:
    with pytest.raises(UserError, match="has no checkpoint"):
        run(stage2, resume=True)


def test_dry_run_writes_no_base_and_marks_a_sample(stage2: Recipe, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_LLAVA_CACHE", str(tmp_path / "cache"))
    stream = io.StringIO()
    dry_run(stage2, Path(), Console(file=stream, width=160))
    output = stream.getvalue()
    assert not (tmp_path / "cache" / "bases").exists()
    assert not Path(stage2.output_dir).exists()
    assert "4 steps of 4 samples" in output
    assert "<image x 4>" in output
    assert "⟦Colours have names. It is red. The answer is A.</s>⟧" in output
