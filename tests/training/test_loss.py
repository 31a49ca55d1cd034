"""The loss of trained tokens has the stock value and gradients with few logits; and the complete fast path."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lora_llava.data.collator import PackedCollator, PaddedCollator
from lora_llava.model.adapters import add_adapters
from lora_llava.model.fast_path import trained_loss
from lora_llava.model.fast_path.trained_loss import count_labels, labelled_loss
from lora_llava.model.loading import load_base
from lora_llava.model.start import prepare_base
from lora_llava.planning.run_plan import plan_run, run_lora_config
from lora_llava.recipe.io import check_recipe
from lora_llava.training.features import cache_features
from lora_llava.training.stages import build_trained_model
from tests.memory import saved_bytes


@pytest.fixture(scope="module")
def vicuna_head() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=32064
    )
    return LlamaForCausalLM(config)


def rows(count: int = 1, tokens: int = 800, trained: int = 150) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 32064, (count, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row in range(count):
        labels[row, : tokens - trained - row] = -100
    return {"input_ids": ids, "labels": labels}


def stock_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Compute the logits of every position, and the mean loss over the trained ones."""
    labels = batch["labels"][:, 1:].flatten()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return F.cross_entropy(model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1), labels, ignore_index=-100)


def test_the_head_keeps_a_quarter_of_full_logits_at_150_of_800(vicuna_head: Any) -> None:
    batch = rows()
    body = saved_bytes(vicuna_head, lambda: vicuna_head.model(batch["input_ids"], use_cache=False).last_hidden_state)
    full = saved_bytes(vicuna_head, lambda: stock_loss(vicuna_head, batch)) - body
    ours = saved_bytes(vicuna_head, lambda: labelled_loss(vicuna_head, batch)[0]) - body
    assert full >= 799 * 32064 * 4
    print(f"{ours / full:.3f}x of full logits")
    assert ours <= 0.25 * full


@pytest.mark.parametrize("at_once", [4, 262])
def test_loss_and_gradients_are_those_of_full_logits(
    vicuna_head: Any, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained_loss, "LOGITS_AT_ONCE", at_once * 32064)
    batch = rows(count=3, tokens=20, trained=4)
    vicuna_head.zero_grad()
    expected = stock_loss(vicuna_head, batch)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in vicuna_head.named_parameters()}
    vicuna_head.zero_grad()
    total, correct = labelled_loss(vicuna_head, batch)
    assert count_labels(batch) == 4 + 5 + 6
    (total / 15).backward()
    torch.testing.assert_close(total / 15, expected, rtol=1e-6, atol=0)
    for name, parameter in vicuna_head.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-7)
    logits = vicuna_head(batch["input_ids"], use_cache=False).logits[:, :-1]
    assert int(correct) == int((logits.argmax(-1) == batch["labels"][:, 1:]).sum())


def test_a_batch_without_trained_tokens_is_a_zero_that_can_be_differentiated(vicuna_head: Any) -> None:
    batch = rows(tokens=5, trained=0)
    total, _ = labelled_loss(vicuna_head, batch)
    total.backward()
    assert total == 0
    assert count_labels(batch) == 0


def test_packed_cached_and_compact_against_the_padded_reference(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    """The complete fast path in fp32 equals stock modules with padding, pixels and all logits."""
    stage2_content["model"]["quantization"] = "none"
    stage2_content["training"] |= {"vision_cache": "memory"}
    recipe = check_recipe(stage2_content, "test")
    plan, base = plan_run(recipe), prepare_base(recipe.model, 0)
    split = plan.splits["train"]
    samples, pixels = split.rows[:7], split.load_pixels
    models = {"fast": build_trained_model(recipe, base)}
    models["stock"] = add_adapters(
        load_base(base.name, dtype="float32"), run_lora_config(recipe, plan.model.config, base.name)
    )
    cache_features(plan, base, Console(file=io.StringIO()))
    generator = torch.Generator().manual_seed(0)
    trained = {name: p.detach().clone() for name, p in models["fast"].named_parameters() if p.requires_grad}
    trained = {
        name: torch.randn(p.shape, generator=generator) * 0.1 if "lora_B" in name else p for name, p in trained.items()
    }
    losses, gradients = {}, {}
    for name, model in models.items():
        own = {key: p for key, p in model.named_parameters() if p.requires_grad}
        for key, parameter in own.items():
            parameter.data.copy_(trained[key])
        model.train()
        if name == "fast":
            batch = PackedCollator(split.load_pixels)(samples)
            loss = labelled_loss(model, batch)[0] / count_labels(batch)
        else:
            loss = stock_loss(model, PaddedCollator(pixels, 897)(samples))
        loss.backward()
        losses[name], gradients[name] = loss.detach(), {key: p.grad for key, p in own.items()}
    assert models["fast"].get_base_model().model.vision_tower is None
    assert losses["fast"].item() == pytest.approx(losses["stock"].item(), rel=1e-5)
    assert gradients["fast"].keys() == gradients["stock"].keys()
    for key, expected in gradients["stock"].items():
        error = (gradients["fast"][key] - expected).norm() / expected.norm()
        assert error <= 1e-5, f"{key}: {error}"
