"""Printed plans: budgets, refusals with a fix, and `lora-llava plan`."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lora_llava.benchmark.benchmark_rows import shape_config
from lora_llava.core.errors import UserError
from lora_llava.planning import forecast as forecasting
from lora_llava.planning.answer_memory import AnswerPlan, answer_bytes, plan_answers
from lora_llava.planning.fit import (
    Extremes,
    build_step,
    choose_checkpointing,
    host_weights,
    leaner_steps,
    measure_rows,
    recomputation,
    resolve_optimizer,
    what_fits,
)
from lora_llava.planning.forecast import forecast, print_forecast
from lora_llava.planning.memory import GIB
from lora_llava.planning.plan_tables import print_memory
from lora_llava.planning.run_plan import plan_run
from lora_llava.planning.timing import published_hours, step_seconds, time_row
from lora_llava.recipe import Recipe, load_recipe
from lora_llava.recipe.io import check_recipe, shipped_recipes
from lora_llava.recipe.schema import StartFrom
from lora_llava.training.finetune import dry_run, finetune


@pytest.fixture(autouse=True)
def expandable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan with the allocator's setting that every verb makes."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def samples() -> Any:
    lengths, trained, images = (np.array(column) for column in zip((10, 4, 1), (20, 2, 0), (7, 7, 2), strict=True))
    return SimpleNamespace(lengths=lengths, supervised=trained, tile_counts=lambda: images, tables=())


def test_the_heaviest_row_is_found() -> None:
    rows = [[0, 1], [2], [0, 2]]
    assert measure_rows(rows, samples(), padded=False) == Extremes(30, 11, 3)
    assert measure_rows(rows, samples(), padded=True) == Extremes(40, 11, 3)


def changed(name: str, **values: Any) -> Recipe:
    """A shipped recipe with values replaced, such as `training_memory_gb=4`."""
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in values.items()]
    return load_recipe(name, overrides)


def planned(recipe: Recipe, tokens: int = 4096) -> Any:
    return build_step(recipe, shape_config("7b", 0, 32000), Extremes(tokens, 1500, 7), cuda=True)


def test_a_number_is_a_budget_in_gib_and_decides_how_much_is_recomputed() -> None:
    counts = []
    for budget in (9, 12, 16, 24, 48):
        recipe = changed("scienceqa_qlora.yaml", training__memory_gb=float(budget))
        step = choose_checkpointing(recipe, planned(recipe))
        assert step.peak <= 0.97 * budget * GIB
        counts.append(step.checkpointed)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 0


def test_true_and_false_are_kept_and_refused_if_they_do_not_fit() -> None:
    recipe = changed("scienceqa_qlora.yaml", training__gradient_checkpointing=True, training__memory_gb=24.0)
    assert choose_checkpointing(recipe, planned(recipe)).checkpointed == 32
    recipe = changed("scienceqa_qlora.yaml", training__gradient_checkpointing=False, training__memory_gb=16.0)
    message = (
        r"a step needs \d+\.\d GiB or more, and 16.0 GiB are available \(training.memory_gb 16 GiB\); set training"
    )
    with pytest.raises(UserError, match=message):
        choose_checkpointing(recipe, planned(recipe))


def test_a_budget_that_is_too_small_names_the_smallest_that_fits() -> None:
    recipe = changed("scienceqa_qlora.yaml", training__memory_gb=4.0)
    message = (
        r"a step needs \d\.\d GiB or more, and 4.0 GiB are available .*; no setting of this recipe fits: use a small"
    )
    with pytest.raises(UserError, match=message):
        choose_checkpointing(recipe, planned(recipe))


def test_the_fix_names_settings_that_fit() -> None:
    recipe = changed("scienceqa_qlora.yaml", training__memory_gb=5.0)
    with pytest.raises(UserError, match=r"; set (.*)$") as caught:
        choose_checkpointing(recipe, planned(recipe))
    overrides = str(caught.value).rsplit("; set ", 1)[1].split()
    fixed = load_recipe("scienceqa_qlora.yaml", ["training.memory_gb=5.0", *overrides])
    tokens = fixed.training.max_tokens_per_row
    assert tokens is not None
    assert choose_checkpointing(fixed, planned(fixed, tokens)).peak <= 5.0 * GIB


def test_a_plan_with_weights_in_host_memory_names_their_cost_and_settings_without() -> None:
    recipe = changed("scienceqa_qlora.yaml", training__memory_gb=6.5)
    step = choose_checkpointing(recipe, planned(recipe))
    assert step.host_layers > 2
    assert recomputation(step) == (
        f"31 of 32 layers recomputed, their inputs in host memory, weights of {step.host_layers} too"
    )
    line = host_weights(recipe, step)
    assert line is not None
    beginning, setting = line.split("; set ")
    assert beginning == (
        f"weights of {step.host_layers} of 32 layers in host memory: {step.host_savings / GIB:.1f} GiB less, at most "
        f"{step.copies * step.copy_seconds:.2f} s a row at PCIe 4 x16 (computed)"
    )
    overrides = setting.removesuffix(" to keep them on the GPU").split()
    fixed = load_recipe("scienceqa_qlora.yaml", ["training.memory_gb=6.5", *overrides])
    tokens = fixed.training.max_tokens_per_row
    assert tokens is not None
    assert choose_checkpointing(fixed, planned(fixed, tokens)).host_layers == 0


def test_copies_take_time_where_they_take_longer_than_a_layer() -> None:
    step = replace(planned(load_recipe("scienceqa_qlora.yaml")), checkpointed=31, host_layers=12)
    without = replace(step, host_layers=0)
    copy = step.copy_seconds
    assert 0.004 < copy < 0.005
    assert step_seconds(1.0, 2.0, step) == step_seconds(1.0, 2.0, without)
    slower = step_seconds(1.0, 1.0 + copy, step) - step_seconds(1.0, 1.0 + copy, without)
    assert slower == pytest.approx(10 * copy / 2)  # the forward pass of a layer takes half of its time


def test_leaner_ways_need_less_one_after_the_other() -> None:
    recipe = load_recipe("scienceqa_lora.yaml")
    step = planned(recipe)
    ways = leaner_steps(recipe, step)
    peaks = [step.peak, *(leaner.peak for _, leaner in ways)]
    assert peaks == sorted(peaks, reverse=True)
    assert ways[0][0] == "model.quantization=nf4"
    assert ways[-1][0].count("max_tokens_per_row") == 1


@pytest.mark.parametrize(("memory_gb", "tiles", "tokens"), [(6.0, 3, 3072), (5.7, 2, 2048)])
def test_fewer_tiles_are_suggested_where_shorter_rows_need_them(memory_gb: float, tiles: int, tokens: int) -> None:
    recipe = changed("scienceqa_qlora_8gb.yaml", training__memory_gb=memory_gb, data__max_length=4096)
    extremes = Extremes(4096, 1500, 5, fewer_tiles=((3, 2900), (2, 1900)))
    step = choose_checkpointing(recipe, build_step(recipe, shape_config("7b", 0, 32000), extremes, cuda=True))
    text = host_weights(recipe, step)
    assert text is not None
    wanted = f"model.max_tiles={tiles} training.max_tokens_per_row={tokens}"
    assert text.endswith(f"set training.optimizer=paged_adamw_8bit {wanted} to keep them on the GPU")
    continued = recipe.model.model_copy(update={"start_from": StartFrom(run="other")})
    ways = leaner_steps(recipe.model_copy(update={"model": continued}), step)
    assert ways
    assert not any("max_tiles" in text for text, _ in ways)


def test_the_recipe_for_8_gb_is_planned_into_8_gb() -> None:
    recipe = load_recipe("scienceqa_qlora_8gb.yaml")
    cards = dict(what_fits(recipe, planned(recipe, 2048)))
    assert cards[8].startswith("as it is; ")
    assert choose_checkpointing(recipe, planned(recipe, 2048)).peak <= 7.7 * GIB


def test_the_optimizer_depends_on_rank_and_device() -> None:
    recipe = load_recipe("scienceqa_qlora.yaml")
    assert resolve_optimizer(recipe, cuda=True) == "paged_adamw_8bit"
    assert resolve_optimizer(recipe, cuda=False) == "adamw_torch"
    assert resolve_optimizer(changed("scienceqa_qlora.yaml", lora__r=32), cuda=True) == "adamw_torch_fused"
    assert resolve_optimizer(load_recipe("demo_align.yaml"), cuda=True) == "adamw_torch_fused"
    paged = changed("demo_align.yaml", training__optimizer="paged_adamw_8bit")
    assert resolve_optimizer(paged, cuda=True) == "paged_adamw_8bit"
    with pytest.raises(UserError, match="paged_adamw_8bit, which needs CUDA; set adamw_torch, or auto"):
        resolve_optimizer(paged, cuda=False)


def test_published_rates_are_scaled_by_size() -> None:
    recipe = load_recipe("scienceqa_qlora.yaml")
    hours = published_hours(planned(recipe), 2330 * 3600)
    assert hours["RTX 4090"] == pytest.approx(1.0, rel=0.01)
    larger = build_step(recipe, shape_config("13b", 0, 32000), Extremes(4096, 1500, 7), cuda=True)
    assert published_hours(larger, 2330 * 3600)["RTX 4090"] == pytest.approx(12.69 / 6.48, rel=0.01)
    assert time_row(recipe, planned(recipe)) is None  # not on a CPU


@pytest.mark.parametrize(("checkpointed", "seconds"), [(0, 65.0), (1, 66.0), (32, 97.0)])
def test_a_recomputed_layer_takes_half_as_long_again(checkpointed: int, seconds: float) -> None:
    """One layer and the rest of a model take 3 s, each further layer 2 s, of which 1 s is its forward pass."""
    step = replace(planned(load_recipe("scienceqa_qlora.yaml")), checkpointed=checkpointed)
    assert step_seconds(3.0, 5.0, step) == seconds


WEIGHTS = ("language model, NF4", "embeddings, head, norms", "vision tower", "projector", "LoRA", "CUDA context")


@pytest.mark.parametrize(("memory_gb", "questions"), [(24, 8), (8, 2), (4, 1)])
def test_as_many_answers_are_planned_as_fit(memory_gb: float, questions: int) -> None:
    recipe = changed("scienceqa_qlora.yaml", training__memory_gb=memory_gb, evaluation__max_new_tokens=1024)
    step = build_step(recipe, shape_config("7b", 0, 32000), Extremes(4096, 1500, 7), cuda=True)
    weights = sum(step.parts()[part] for part in WEIGHTS)
    each = answer_bytes(step.config.text_config, 2, 1024, new_tokens=1024)
    assert plan_answers(recipe, step, 1024) == AnswerPlan(questions, weights + questions * each, memory_gb != 4)
    none = recipe.evaluation.model_copy(update={"before": 0, "after": 0})  # type: ignore[union-attr]
    for other in (None, none):
        assert plan_answers(recipe.model_copy(update={"evaluation": other}), step, 1024) is None


@pytest.mark.parametrize(
    ("memory_gb", "row"),
    [("auto", "answers before and after training: 8 questions at once "), (0.7, "questions at once, of evaluation.")],
)
def test_the_table_has_the_answers(stage2_content: dict[str, Any], memory_gb: Any, row: str) -> None:
    stage2_content["training"]["memory_gb"] = memory_gb
    stage2_content["evaluation"] = {"max_new_tokens": 50_000}
    stream = io.StringIO()
    recipe = check_recipe(stage2_content, "test")
    step = forecast(recipe).step
    print_memory(recipe, step, 400, Console(file=stream, width=160))
    assert row in stream.getvalue()


def test_a_forecast_is_the_plan(stage2: Recipe) -> None:
    """24 samples are all encoded, so that the forecast and the plan of a run that shares no images agree."""
    stage2 = stage2.model_copy(update={"training": stage2.training.model_copy(update={"share_images": "off"})})
    plan, found = plan_run(stage2), forecast(stage2)
    assert (found.step.tokens, found.step.trained_tokens) == (plan.step.tokens, plan.step.trained_tokens)
    assert found.steps == plan.order.steps == 4
    assert found.tokens == pytest.approx(sum(plan.order.tokens_per_row for _ in plan.order.rows), rel=0.1)


def test_a_plan_opens_no_image_and_loads_no_weights(
    stage2: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("lora_llava.data.images.image_sources.read_rgb", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    stream = io.StringIO()
    print_forecast(stage2, Console(file=stream, width=160))
    output = stream.getvalue()
    for part in ("language model, NF4", "vision tower", "optimizer", "activations, kept", "peak", "24 GB"):
        assert part in output
    assert "4 steps" in output
    assert "timed here on random weights" in output


def test_a_plan_without_its_data_reports_that(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    stage2_content["data"]["path"] = str(tmp_path / "nowhere")
    stream = io.StringIO()
    print_forecast(check_recipe(stage2_content, "test"), Console(file=stream, width=300))
    assert "data not available" in stream.getvalue()
    assert "time: not known without the data" in stream.getvalue()


def test_a_plan_that_cannot_run_here_is_refused_after_its_table(stage2_content: dict[str, Any]) -> None:
    stage2_content["training"]["memory_gb"] = 0.2
    recipe = check_recipe(stage2_content, "test")
    stream = io.StringIO()
    with pytest.raises(UserError, match=r"a step needs 0\.\d GiB or more, and 0.2 GiB are available"):
        print_forecast(recipe, Console(file=stream, width=160))
    assert "peak" in stream.getvalue()
    assert "and 0.2 GiB are available (training.memory_gb 0.2 GiB)" in str(plan_run(recipe).refusal)
    for run in (finetune, dry_run):
        stream = io.StringIO()
        with pytest.raises(UserError, match=r"and 0.2 GiB are available \(training.memory_gb 0.2 GiB\)"):
            run(recipe, Path(), console=Console(file=stream, width=160))
        assert "Memory of a step" in stream.getvalue()
    assert not Path(recipe.output_dir).exists()


def test_many_rows_are_scaled_up(stage2: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = forecast(stage2)
    monkeypatch.setattr(forecasting, "_ROWS", 8)
    monkeypatch.setattr(forecasting, "_SAMPLES", 8)
    scaled = forecast(stage2)
    assert scaled.steps == exact.steps
    assert exact.tokens is not None
    assert scaled.tokens == pytest.approx(exact.tokens, rel=0.3)


def test_every_shipped_recipe_packs_or_batches() -> None:
    for file in shipped_recipes():
        training = load_recipe(file).training
        assert training.max_tokens_per_row is None or training.max_tokens_per_row >= load_recipe(file).data.max_length
