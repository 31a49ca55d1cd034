"""Lean modules keep less for the backward pass, with the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaModel

from lora_llava.model.fast_path.lean import make_lean
from tests.memory import saved_bytes

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def language_model(layers: int = 2, dtype: torch.dtype = torch.bfloat16, lean_first: bool = False, **lora: Any) -> Any:
    """Build a Llama with Vicuna's proportions (11008 / 4096 = 2.6875) and PEFT's adapters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=50,
        attn_implementation="sdpa",
    )
    model = LlamaModel(config).to(dtype).requires_grad_(False)
    if lean_first:
        assert make_lean(model) == 3 * layers + 1  # two norms and an MLP a layer, and the last norm
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=LINEARS, **lora))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return adapted.train()


def activation_bytes(model: Any, autocast: bool = True) -> float:
    """Return the bytes per token and layer, as a slope over tokens and layers, without constant parts."""
    layers = model.get_base_model().layers

    def run(tokens: int, depth: int) -> int:
        model.get_base_model().layers = layers[:depth]
        inputs = torch.randn(1, tokens, 128, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return saved_bytes(model, lambda: model(inputs_embeds=inputs, use_cache=False).last_hidden_state)

    try:
        two, one = (run(96, depth) - run(32, depth) for depth in (2, 1))
        return (two - one) / 64
    finally:
        model.get_base_model().layers = layers


@pytest.mark.parametrize("autocast", [True, False])
def test_at_most_065_of_what_peft_s_defaults_keep(autocast: bool) -> None:
    """With dropout 0.05, as in LLaVA's and TRL's recipes, with and without the trainer's autocast."""
    stock = activation_bytes(language_model(lora_dropout=0.05), autocast)
    lean_model = language_model()
    make_lean(lean_model)
    lean = activation_bytes(lean_model, autocast)
    print(f"autocast {autocast}: {lean:.0f} of {stock:.0f} bytes per token and layer, {lean / stock:.3f}x")
    assert lean <= 0.65 * stock


def step(model: Any, dtype: torch.dtype, autocast: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the output of a forward pass and every gradient."""
    embeds = torch.randn(1, 40, 128, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    output.float().square().mean().backward()
    assert embeds.grad is not None
    return output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"": embeds.grad}


def test_norms_and_mlps_are_bit_equal() -> None:
    output, expected = step(language_model(), torch.bfloat16)
    found_output, found = step(language_model(lean_first=True), torch.bfloat16)
    assert torch.equal(found_output, output)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True, "lora_alpha": 16}, {"use_dora": True}])
def test_adapters_are_equal_up_to_rounding(lora: dict[str, Any]) -> None:
    """DoRA is left to peft."""
    output, expected = step(language_model(dtype=torch.float32, **lora), torch.float32)
    lean_model = language_model(dtype=torch.float32, **lora)
    assert make_lean(lean_model) == 2 * (7 + 2 + 1) + 1
    found_output, found = step(lean_model, torch.float32)
    torch.testing.assert_close(found_output, output, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_under_autocast_adapters_round_once_less() -> None:
    """The error against float32 is no larger than peft's, which rounds the product before adding it."""
    reference, _ = step(language_model(dtype=torch.float32), torch.float32)
    errors = []
    for lean in (False, True):
        model = language_model()
        if lean:
            make_lean(model)
        output, gradients = step(model, torch.bfloat16, autocast=True)
        errors.append((output.float() - reference).norm())
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert errors[1] <= 1.05 * errors[0]


def test_disabled_or_merged_adapters_are_left_to_peft() -> None:
    model = language_model(dtype=torch.float32)
    make_lean(model)
    embeds = torch.randn(1, 9, 128)
    with torch.no_grad():
        with_adapters = model(inputs_embeds=embeds).last_hidden_state
        with model.disable_adapter():
            without = model(inputs_embeds=embeds).last_hidden_state
        assert not torch.allclose(with_adapters, without, atol=1e-3)
        model.merge_adapter()
        torch.testing.assert_close(model(inputs_embeds=embeds).last_hidden_state, with_adapters, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(model(inputs_embeds=embeds).last_hidden_state, with_adapters, rtol=1e-4, atol=1e-4)


def test_a_norm_that_trains_stays_stock() -> None:
    model = language_model(layers=1)
    norm = model.get_base_model().layers[0].input_layernorm
    norm.weight.requires_grad_()
    assert make_lean(model) == 7 + 3
    model(inputs_embeds=torch.randn(1, 5, 128, dtype=torch.bfloat16)).last_hidden_state.float().sum().backward()
    assert norm.weight.grad is not None


def test_modules_that_are_not_llama_s_stay_stock() -> None:
    assert make_lean(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))) == 0
