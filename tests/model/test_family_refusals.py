"""Language models, towers and complete LLaVAs that cannot be held are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_llava.core.errors import UserError
from lora_llava.model.start import plan_model, prepare_base
from lora_llava.recipe.schema import ModelSection
from tests.model.small_families import make_llm, section

GEMMA2 = {"model_type": "gemma2", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (GEMMA2, "gemma2 has final_logit_softcapping 30.0, which stock LlavaForConditionalGeneration does not do"),
    ({"model_type": "granite", "logits_scaling": 8.0}, "granite has logits_scaling 8.0, which"),
    ({"model_type": "cohere"}, "cohere has logit_scale 0.0625, which"),
    ({"model_type": "llava", "text_config": {}, "vision_config": {}}, "is a 'llava' model with a text_config"),
    ({"model_type": "qwen2_vl", "vision_config": {}}, "is a 'qwen2_vl' model with a vision_config"),
    ({"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "which is more than a language model"),
    ({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1}, "gpt2 has no `model.layers`"),
    ({"model_type": "mamba", "num_hidden_layers": 1}, "mamba has no `model.layers`"),
    ({"model_type": "phi", "num_hidden_layers": 1, "hidden_size": 32}, "phi has no `lm_head` of one matrix"),
    ({"model_type": "llama4"}, "is a 'llama4' model with a "),
    ({"model_type": "recurrent_gemma", "num_hidden_layers": 1}, "recurrent_gemma changes its logits after the head"),
    ({"model_type": "bert"}, "bert has no `model.layers`"),
    ({"model_type": "vit"}, "is a 'vit' model, which is not a causal language model"),
    ({"model_type": "unheard_of"}, "which the installed transformers does not know"),
    ({}, "config.json has no model_type"),
    ({"model_type": ["llama"]}, "config.json has no model_type"),
    ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "its weights are quantized (awq)"),
    ({"model_type": "llama", "hidden_size": "many"}, "config.json is not a llama model's"),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "it does not generate text"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[str(c.get("model_type")) for c, _ in REFUSED])
def test_a_language_model_that_cannot_be_held_is_refused_in_one_line(
    made: Path, tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300} | content))
    with pytest.raises(UserError) as caught:
        plan_model(section(tmp_path, made / "clip"))
    assert message in str(caught.value)
    assert str(caught.value).startswith("model.llm")
    assert "\n" not in str(caught.value)


TOWERS_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "siglip2", "vision_config": {"model_type": "siglip2_vision_model"}}, "NaFlex has no fixed grid"),
    ({"model_type": "siglip2_vision_model"}, "NaFlex has no fixed grid"),
    ({"model_type": "dinov2"}, "the towers that work are clip_vision_model and siglip_vision_model"),
    ({"model_type": "llama"}, "is a 'llama' model"),
    ({"model_type": "clip_vision_model", "image_size": 8, "patch_size": 14}, "give no grid of patches"),
    ({"model_type": "siglip_vision_model", "hidden_size": "wide"}, "config.json is not a siglip_vision_model's"),
]


@pytest.mark.parametrize(("content", "message"), TOWERS_REFUSED)
def test_a_tower_without_a_patch_grid_is_refused_in_one_line(
    made: Path, tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        plan_model(section(made / "llama", tmp_path))
    assert message in str(caught.value)
    assert str(caught.value).startswith("model.vision_tower")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"text_config": GEMMA2}, {"vision_config": {"model_type": "siglip2_vision_model"}}])
def test_a_complete_llava_goes_through_the_same_checks(base: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    content = json.loads((base("qwen2", "siglip").folder / "config.json").read_text())
    content.pop("image_seq_length")  # older checkpoints have none, or a wrong one
    start = ModelSection.model_validate({"start_from": {"llava": str(tmp_path)}})
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert plan_model(start).config.image_seq_length == 9
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=r"model\.start_from\.llava") as caught:
        plan_model(start)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_one_line(made: Path, tmp_path: Path) -> None:
    llm = make_llm(tmp_path / "llm", "qwen2")
    file = llm / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "llama", "attention_bias": False}))
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"num_hidden_layers": 4, "layer_types": None}))
    with pytest.raises(UserError, match=r"llm: its weights lack model\.language_model\.layers\.3"):
        prepare_base(section(llm, made / "clip"), 0)
    file.write_text(json.dumps(json.loads(before) | {"intermediate_size": 64}))
    with pytest.raises(UserError, match=r"has shape \(48, 32\), its config.json requires \(64, 32\)"):
        prepare_base(section(llm, made / "clip"), 0)
