"""Weights in host memory give the same training and the same answers, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ends import act_at

from lora_llava.model.adapters import add_adapters, lora_config
from lora_llava.model.fast_path.activation_checkpointing import checkpoint_language_model
from lora_llava.model.fast_path.host_weights import HostWeights, keep_in_host_memory
from lora_llava.model.fast_path.lean import make_lean
from lora_llava.model.loading import default_device
from lora_llava.model.random_weights import build_random_llava
from lora_llava.planning import run_plan
from lora_llava.recipe.io import check_recipe
from lora_llava.recipe.schema import LINEARS
from tests.memory import small_config
from tests.training.small_runs import PulledPlugError, pull_plug, run, same, weights

CONFIG = small_config(layers=5, inner=384)


def built(host: int, targets: Any = LINEARS, offload: bool = True) -> tuple[Any, HostWeights | None]:
    """Return a model whose first four layers are recomputed, with the weights of some of them in host memory."""
    torch.manual_seed(0)
    model = build_random_llava(CONFIG, quantization="nf4", dtype=torch.float32, device=default_device())
    kept = keep_in_host_memory(model.model.language_model, host)
    adapted = add_adapters(model, lora_config(r=4, alpha=8, targets=targets)).train()
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # a gradient reaches A only then
            torch.nn.init.normal_(parameter, std=0.1)
    make_lean(model.model.language_model)
    checkpoint_language_model(model, 4, offload)
    return adapted, kept


def inputs(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(5, 490, (1, 6), generator=generator)
    ids = torch.cat([torch.tensor([[1, 499, 499, 499, 499]]), text], dim=1)
    pixels = torch.randn(1, 3, 28, 28, generator=generator)
    return {name: each.to(default_device()) for name, each in (("input_ids", ids), ("pixel_values", pixels))}


def trained(model: Any, steps: int = 2) -> dict[str, torch.Tensor]:
    """Train some steps of two passes, with a validation between them; return losses, gradients and answers."""
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    found = {}
    for step in range(steps):
        for number in range(2):
            batch = inputs(10 * step + number)
            loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
            loss.backward()
            found[f"loss {step}.{number}"] = loss.detach()
        found |= {f"{name} {step}": each.grad.clone() for name, each in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            found[f"logits {step}"] = model(**inputs(5)).logits
        found[f"answer {step}"] = model.generate(**inputs(5), max_new_tokens=4, do_sample=False)
        model.train()
    return found


@pytest.mark.parametrize("host", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("targets", "offload"), [(LINEARS, True), (LINEARS, False), (("q_proj",), True)], ids=["offload", "keep", "q_proj"]
)
def test_training_and_answers_are_equal_to_the_bit(host: int, targets: Any, offload: bool) -> None:
    """With an adapter on q_proj only, 4-bit layers run backward before anything of their layer is recomputed."""
    expected = trained(built(0, targets, offload)[0])
    found = trained(built(host, targets, offload)[0])
    assert len(expected) > 20
    assert found.keys() == expected.keys()
    assert [name for name, each in expected.items() if not torch.equal(found[name], each)] == []


def test_a_pass_copies_each_layer_but_the_last_two_again() -> None:
    """Two layers are on the device when a pass turns, so n layers need 2 (n - 2) copies a pass."""
    model, kept = built(4)
    assert kept is not None
    trained(model, 1)
    copied: list[int] = []
    copy = kept._copy
    kept._copy = lambda index: (copied.append(index) if kept._present[index % 2] != index else None, copy(index))[1]  # type: ignore[method-assign]
    for number in range(3):
        del copied[:]
        batch = inputs(number)
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    assert copied == [2, 3, 1, 0]


def test_the_weights_of_all_layers_share_two_buffers() -> None:
    model, kept = built(4)
    layers = model.get_base_model().model.language_model.layers
    weights = [[each for each in layer.parameters() if hasattr(each, "quant_state")] for layer in layers]
    storages = [{each.untyped_storage().data_ptr() for each in layer} for layer in weights]
    scales = [{each.quant_state.absmax.untyped_storage().data_ptr() for each in layer} for layer in weights]
    assert [len(layer) for layer in weights] == [7] * 5
    assert storages[0] == storages[2] == scales[0]
    assert storages[1] == storages[3] == scales[3]
    assert storages[0] != storages[1]
    assert len(storages[4]) == 7
    assert kept is not None
    values = 4 * 128 * 128 + 3 * 128 * 384
    assert kept.host_bytes == pytest.approx(4 * values * (0.5 + 1 / 64), rel=0.01)


@pytest.mark.more
def test_a_run_is_resumed_and_evaluated_equally(
    stage2_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with both layers' weights in host memory, stopped and resumed, is a run without, answers included."""
    stage2_content["training"] |= {"max_steps": 6, "gradient_accumulation": 2, "batch_size": 2}
    recipe = check_recipe(stage2_content, "test")
    run(recipe)
    choose = run_plan.choose_checkpointing
    monkeypatch.setattr(
        run_plan,
        "choose_checkpointing",
        lambda *each: replace(choose(*each), checkpointed=2, offloaded=True, host_layers=2),
    )
    other = check_recipe(stage2_content | {"output_dir": str(tmp_path / "other")}, "test")
    with monkeypatch.context() as patch:
        act_at(5, pull_plug, patch.setattr)
        with pytest.raises(PulledPlugError):
            run(other)
    run(other, resume=True)
    first, second = (json.loads(Path(each.output_dir, "metrics.json").read_text()) for each in (recipe, other))
    assert (first["step"]["host_layers"], second["step"]["host_layers"]) == (0, 2)
    assert same(weights(Path(recipe.output_dir)), weights(tmp_path / "other"))
    assert first["train"]["loss_curve"] == second["train"]["loss_curve"]
    assert first["after"] == second["after"]
    answers = [(Path(each.output_dir) / "predictions_after.jsonl").read_text() for each in (recipe, other)]
    assert answers[0] == answers[1]
