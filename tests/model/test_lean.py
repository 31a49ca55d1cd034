"""What is kept for the backward pass: less, and to the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaModel

from lora_llava.model.lean import make_lean
from tests.memory import saved_bytes

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def language_model(layers: int = 2, dropout: float = 0.0) -> Any:
    """Vicuna's proportions (11008 / 4096 = 2.6875) in bfloat16, with PEFT's adapters as PEFT makes them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=344, num_hidden_layers=layers, num_attention_heads=4, vocab_size=50,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaModel(config).to(torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_dropout=dropout, target_modules=LINEARS))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return adapted.train()


def activation_bytes(model: Any, autocast: bool = True) -> float:
    """Bytes per token and layer: the slope over tokens and over layers takes off what is there once."""
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
    """With dropout 0.05, as LLaVA's and TRL's recipes have it; under the trainer's autocast and without it."""
    stock = activation_bytes(language_model(dropout=0.05), autocast)
    lean_model = language_model()
    make_lean(lean_model)
    lean = activation_bytes(lean_model, autocast)
    print(f"autocast {autocast}: {lean:.0f} of {stock:.0f} bytes per token and layer, {lean / stock:.3f}x")
    assert lean <= 0.65 * stock


def test_outputs_and_gradients_stay_to_the_bit() -> None:
    inputs = torch.randn(1, 40, 128, dtype=torch.bfloat16)

    def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        embeds = inputs.clone().requires_grad_()
        output = model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        output.float().square().mean().backward()
        assert embeds.grad is not None
        return output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"": embeds.grad}

    output, expected = step(language_model())
    lean_model = language_model()
    assert make_lean(lean_model) == 2 * 2 + 2 + 1
    found_output, found = step(lean_model)
    assert torch.equal(found_output, output)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_norm_that_trains_stays_stock() -> None:
    model = language_model(layers=1)
    norm = model.get_base_model().layers[0].input_layernorm
    norm.weight.requires_grad_()
    assert make_lean(model) == 3
    model(inputs_embeds=torch.randn(1, 5, 128, dtype=torch.bfloat16)).last_hidden_state.float().sum().backward()
    assert norm.weight.grad is not None


def test_modules_that_are_not_llama_s_stay_stock() -> None:
    assert make_lean(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))) == 0
