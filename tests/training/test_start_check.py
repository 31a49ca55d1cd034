"""The check at every start passes equal losses and stops a run with different ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava.data.collator import PackedCollator, PaddedCollator
from lora_llava.data.images.image_sources import Pixels
from lora_llava.model.fast_path.attention import resolve_attention
from lora_llava.model.start import prepare_base
from lora_llava.planning.run_plan import plan_run
from lora_llava.recipe import Recipe
from lora_llava.recipe.io import check_recipe
from lora_llava.training.stages import build_trained_model, train
from lora_llava.training.start_check import StartCheckError, check_first_batch


@pytest.fixture
def start(stage2: Recipe) -> tuple[Any, list[dict[str, Any]], PaddedCollator, PackedCollator]:
    plan = plan_run(stage2)
    model = build_trained_model(stage2, prepare_base(stage2.model, 0))
    pixels = Pixels(plan.splits["train"].images, plan.processor.image_processor)
    return model, plan.splits["train"].rows[:4], PaddedCollator(pixels, 897), PackedCollator(pixels)


def test_equal_losses_pass_and_the_model_is_unchanged(start: Any) -> None:
    model, rows, padded, packed = start
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    output = check_first_batch(model, rows, padded, packed)
    packed_loss, padded_loss = (part.split(" ")[1] for part in output.removesuffix(": equal").split(", "))
    assert packed_loss == padded_loss
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_samples_that_attend_to_each_other_stop_the_run(start: Any) -> None:
    model, rows, padded, packed = start

    def leaking(rows: Any) -> Any:
        batch = packed(rows)
        end = torch.tensor([0, batch["input_ids"].shape[1]], dtype=torch.int32)
        return batch | {"cu_seq_lens_q": end, "cu_seq_lens_k": end}

    with pytest.raises(StartCheckError, match=r"packed \d\.\d+, padded \d\.\d+: they should be equal; set model"):
        check_first_batch(model, rows, padded, leaking)


def test_padded_and_padding_free_training_end_at_the_same_weights(
    stage2_content: dict[str, Any], tmp_path: Path
) -> None:
    ends = []
    for attention in ("sdpa", "flash_varlen"):
        stage2_content["model"] |= {"attention": attention, "quantization": "none"}
        stage2_content["output_dir"] = str(tmp_path / attention)
        stage2_content["training"] |= {"learning_rate": 1e-3, "group_by_length": False, "share_images": "off"}
        recipe = check_recipe(stage2_content, "test")
        plan, base = plan_run(recipe), prepare_base(recipe.model, 0)
        Path(recipe.output_dir).mkdir()
        model = build_trained_model(recipe, base)
        result = train(plan, base, model)
        ends.append((result, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}))
    (padded, expected), (packed, found) = ends
    assert (packed.tokens, packed.supervised_tokens) == (padded.tokens, padded.supervised_tokens)
    assert packed.best_validation_loss == pytest.approx(padded.best_validation_loss, rel=1e-4)
    for name, parameter in found.items():
        if "lora_B" not in name:  # Adam's first steps on a zero B have the sign of rounding
            torch.testing.assert_close(parameter, expected[name], rtol=0, atol=2e-4, msg=name)


def test_the_attention_is_described() -> None:
    assert resolve_attention("auto", torch.float32) == (True, "flash_varlen, padding-free, by SDPA on each sample")
    assert resolve_attention("sdpa", torch.float32) == (False, "sdpa, padded")
