"""The planner's memory of vision adapters, full matrices, new tokens and EVA's ranks, against measurements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig

from lora_llava.model.adapters import lora_config, planned_parameters
from lora_llava.model.vision_adapters import vision_adapters
from lora_llava.planning.trained_memory import full_parameters, tower_bytes, vision_lora_parameters
from lora_llava.recipe.schema import LINEARS, VISION_LINEARS, LoraSection
from tests.memory import saved_bytes
from tests.training.test_memory import SMALL, step_of

TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def section(**vision: Any) -> LoraSection:
    return LoraSection.model_validate({"r": 4, "vision": {"r": 4} | vision})


@pytest.mark.parametrize("targets", [VISION_LINEARS, ("fc2",), ("k_proj", "v_proj"), ("out_proj", "fc1")])
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_tower_layer_keeps_the_computed_bytes(targets: Any, dtype: torch.dtype, size: int, dropout: float) -> None:
    def kept(depth: int, images: int) -> int:
        tower = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=depth, **TOWER)).to(dtype).requires_grad_(False)
        config = LoraConfig(r=4, lora_dropout=dropout, target_modules=list(targets))
        adapted = get_peft_model(tower, config).train()
        return saved_bytes(adapted, lambda: adapted(pixel_values=torch.randn(images, 3, 32, 32, dtype=dtype)))

    measured = (kept(3, 4) - kept(2, 4)) - (kept(3, 2) - kept(2, 2))
    config = LlavaConfig(vision_config=CLIPVisionConfig(num_hidden_layers=2, **TOWER))  # one layer is used
    lora = section(targets=list(targets)).model_copy(update={"dropout": dropout})
    planned = tower_bytes(config, lora, 2, size, cuda=False)
    assert measured <= planned <= 1.02 * measured


@pytest.mark.parametrize("dora", [False, True])
def test_vision_adapters_are_counted_as_peft_makes_them(dora: bool) -> None:
    lora = section(r=3, targets=["q_proj", "fc1"]).model_copy(update={"dora": dora})
    vision = vision_adapters(lora.vision.model_dump(), SMALL)  # type: ignore[union-attr]
    made = planned_parameters(SMALL, lora_config(r=4, targets=LINEARS, dora=dora, vision=vision))
    assert vision_lora_parameters(SMALL, lora) == made["vision_lora"]


def test_full_matrices_and_rows_are_counted_as_peft_makes_them() -> None:
    lora = LoraSection(r=4, modules_to_save=("lm_head", "embed_tokens"))
    made = planned_parameters(SMALL, lora_config(r=4, targets=LINEARS, modules_to_save=lora.modules_to_save))
    assert full_parameters(SMALL, lora) == made["lm_head"] + made["embed_tokens"] == 2 * 500 * 128
    made = planned_parameters(SMALL, lora_config(r=4, targets=LINEARS, token_ids=[497, 498, 496]))
    assert made["new_tokens"] == 2 * 3 * 128
    step = step_of("small", lora=LoraSection(r=4), new_tokens=3)
    plain = step_of("small", lora=LoraSection(r=4))
    assert step.parts()["gradients"] - plain.parts()["gradients"] == 4 * made["new_tokens"]


@pytest.mark.parametrize(
    "change",
    [
        {"lora": section().model_copy(update={"r": 16})},
        {"lora": LoraSection(r=16, modules_to_save=("lm_head",))},
        {"lora": LoraSection(r=16, modules_to_save=("embed_tokens",))},
        {"lora": LoraSection(r=16, init="eva")},
        {"new_tokens": 1},
    ],
)
def test_each_choice_needs_more_memory_than_none(change: dict[str, Any]) -> None:
    plain = {"cached_features": False}
    assert step_of(**plain | change).peak > step_of(**plain).peak


def test_eva_is_planned_for_its_largest_ranks() -> None:
    step = step_of(lora=LoraSection(r=8, init="eva"))
    h, i = 4096, 11008
    # The budget of 7 layers of rank 8 pays three layers of rank 16 in the MLP, and one of rank 8 in the attention.
    assert step.lora_parameters == 32 * (3 * 16 * (h + i) + 8 * 2 * h)
