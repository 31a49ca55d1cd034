"""The trained parameters and the 4-bit layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from lora_llava.model.adapters import add_adapters, freeze_plan, lora_config, planned_parameters, trained_projector
from lora_llava.model.base import assembled_config
from lora_llava.model.fast_path.activation_checkpointing import checkpoint_language_model
from lora_llava.model.loading import check_quantized, is_4bit, load_base
from lora_llava.model.start import prepare_base
from lora_llava.recipe import Recipe
from lora_llava.recipe.schema import LINEARS

CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
VICUNA: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}


def vicuna(size: str, projector_type: str = "mlp2x_gelu") -> LlavaConfig:
    return assembled_config({"model_type": "llama", "vocab_size": 32000} | VICUNA[size], CLIP_L, projector_type)


@pytest.mark.parametrize(
    ("size", "projector_type", "expected"),
    [
        ("7b", "mlp2x_gelu", {"lora": 159_907_840, "projector": 20_979_712}),
        ("13b", "mlp2x_gelu", {"lora": 250_347_520, "projector": 31_467_520}),
        ("7b", "linear", {"lora": 159_907_840, "projector": 4_198_400}),
    ],
)
def test_trained_parameters_at_true_shape(size: str, projector_type: str, expected: dict[str, int]) -> None:
    assert planned_parameters(vicuna(size, projector_type), lora_config(r=64, targets=LINEARS)) == expected


def test_nothing_of_clip_embeddings_or_head_trains_at_7b() -> None:
    with torch.device("meta"):
        model = add_adapters(LlavaForConditionalGeneration(vicuna("7b")), lora_config(targets=LINEARS))
    trained = {row.module for row in freeze_plan(model) if row.trained}
    frozen = {row.module for row in freeze_plan(model) if not row.trained}
    assert trained == {"LoRA adapters", "projector"}
    assert frozen == {"vision tower", "embeddings", "language model", "head"}


def test_stage_1_trains_only_the_projector() -> None:
    assert planned_parameters(vicuna("7b"), lora_config()) == {"lora": 0, "projector": 20_979_712}


def test_nf4_is_the_language_models_linears_and_nothing_else(stage2: Recipe) -> None:
    model = load_base(prepare_base(stage2.model, 0).name, quantization="nf4")
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantised = {name for name, module in model.named_modules() if is_4bit(module)}
    assert quantised == {name for name in linears if name.startswith("model.language_model.layers.")}
    assert len(quantised) == 2 * 7
    with pytest.raises(RuntimeError, match="4-bit, against the recipe"):
        check_quantized(model, "none")


def test_gradients_are_the_same_after_an_evaluation(stage2: Recipe) -> None:
    """bitsandbytes repacks weights at the first evaluation on AVX512-BF16 CPUs; the backward must survive it."""
    model = load_base(prepare_base(stage2.model, 0).name, quantization="nf4")
    ids = torch.randint(3, 800, (2, 9), generator=torch.Generator().manual_seed(0))

    def gradient() -> torch.Tensor:
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds, use_cache=False).logits[..., :7].sum().backward()
        assert embeds.grad is not None
        return embeds.grad

    before = gradient()
    with torch.no_grad():
        model(input_ids=ids)
    assert torch.equal(gradient(), before)
    assert before.abs().sum() > 0


def test_identity_layer_of_a_linear_projector_is_frozen(stage2: Recipe) -> None:
    section = stage2.model.model_copy(update={"projector_type": "linear"})
    model = add_adapters(load_base(prepare_base(section, 0).name), lora_config(r=2, targets=("q_proj",)))
    projector = trained_projector(model)
    trained = {name for name, p in projector.named_parameters() if p.requires_grad}
    assert trained == {"linear_1.weight", "linear_1.bias"}


def test_projector_dropout_is_on_in_training_only_and_leaves_no_trace(stage2: Recipe) -> None:
    base = prepare_base(stage2.model, 0).name
    config = lora_config(r=2, targets=("q_proj",))
    plain, dropped = add_adapters(load_base(base), config), add_adapters(load_base(base), config, 0.5)
    features = torch.randn(2, 4, 32)
    with torch.no_grad():
        expected = trained_projector(plain)(features)
        assert torch.equal(trained_projector(dropped).eval()(features), expected)
        noisy = trained_projector(dropped).train()(features)
    share = (noisy == 0).float().mean().item()
    assert 0.3 < share < 0.7
    assert dropped.state_dict().keys() == plain.state_dict().keys()


def test_clip_builds_no_graph_under_checkpointing(stage2: Recipe) -> None:
    model = add_adapters(load_base(prepare_base(stage2.model, 0).name), lora_config(r=2, targets=("q_proj",)))
    inner = model.get_base_model().model
    checkpoint_language_model(model.get_base_model())
    assert all(layer.gradient_checkpointing for layer in inner.language_model.layers)
    output = inner.vision_tower(torch.randn(1, 3, 32, 32))
    assert not output.last_hidden_state.requires_grad
