"""A LLaVA of every language model family and tower: weights, ids, image tokens, fast path, counts, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipImageProcessorPil,
)

from lora_llava.core.errors import UserError
from lora_llava.data.tokens import leading_ids
from lora_llava.model.adapters import add_adapters, lora_config, planned_parameters
from lora_llava.model.families.decoder_shape import decoder_shape, tower_parameters
from lora_llava.model.families.language_families import FAMILIES, outside_the_table
from lora_llava.model.families.tower_families import image_processor_of, image_tokens
from lora_llava.model.fast_path import attention
from lora_llava.model.fast_path.attention import flash_varlen_attention, resolve_attention, use_flash_varlen
from lora_llava.model.fast_path.lean import make_lean
from lora_llava.model.loading import load_base
from lora_llava.model.start import plan_model, prepare_base
from lora_llava.model.tokenizer import load_tokenizer
from lora_llava.model.vision import load_tower, tower_features
from lora_llava.planning.memory import Step
from lora_llava.recipe.schema import LoraSection
from tests.model.small_families import ALL, SPARE_ROWS, TOWER_KINDS, make_llm, section

PAIRS = [(family, tower) for family in ALL for tower in TOWER_KINDS]
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 44, 3), dtype=np.uint8))


def test_the_table_is_tried_whole() -> None:
    assert set(FAMILIES) | {"smollm2"} == set(ALL)


@pytest.mark.parametrize(("family", "tower"), PAIRS)
def test_a_base_loads_in_stock_classes_and_its_text_is_the_language_model_s(
    base: Any, made: Path, family: str, tower: str
) -> None:
    llava, info = LlavaForConditionalGeneration.from_pretrained(
        base(family, tower).folder, dtype=torch.float32, output_loading_info=True
    )
    assert (set(info["missing_keys"]), set(info["unexpected_keys"])) == (set(), set())
    llm = AutoModelForCausalLM.from_pretrained(made / family, dtype=torch.float32)
    ids = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, ours = llm(ids).logits, llava(input_ids=ids).logits
    assert own.std() > 0.05
    assert torch.equal(own, ours[..., : own.shape[-1]])


@pytest.mark.parametrize("family", ALL)
def test_ids_are_in_spare_rows_where_there_are_any(base: Any, made: Path, family: str) -> None:
    folder = base(family, "clip").folder
    rows = json.loads((made / family / "config.json").read_text())["vocab_size"]
    config, before = LlavaConfig.from_pretrained(folder), rows - SPARE_ROWS.get(family, 0)
    tokenizer = load_tokenizer(folder, config)
    assert config.image_token_index == before == tokenizer.convert_tokens_to_ids("<image>")
    assert tokenizer.pad_token_id == config.pad_token_id == config.text_config.pad_token_id
    assert tokenizer.pad_token_id == (0 if family == "qwen2" else before + 1)  # its own differs from BOS and EOS
    room = SPARE_ROWS.get(family, 0) >= (1 if family == "qwen2" else 2)
    assert config.text_config.vocab_size == (rows if room else -(-(before + 2) // 64) * 64)


@pytest.mark.parametrize("family", ["llama", "smollm2", "qwen2"])
def test_bos_is_added_as_the_tokenizer_itself_adds_it(base: Any, made: Path, family: str) -> None:
    for tokenizer in (load_tokenizer(made / family), load_tokenizer(base(family, "clip").folder)):
        assert leading_ids(tokenizer) == ([1] if family == "llama" else [])
        assert tokenizer("a").input_ids[:1] != tokenizer("a").input_ids[1:2]


def test_a_tokenizer_that_appends_a_token_is_refused(made: Path, tmp_path: Path) -> None:
    llm = make_llm(tmp_path / "llm", "qwen3")
    tokenizer = Tokenizer.from_file(str(llm / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)])
    tokenizer.save(str(llm / "tokenizer.json"))
    with pytest.raises(UserError, match=r"puts tokens behind a text .*; set add_eos_token to false"):
        plan_model(section(llm, made / "clip"))


@pytest.mark.parametrize("tower", TOWER_KINDS)
@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_image_tokens_are_those_of_the_stock_processor(base: Any, tmp_path: Path, tower: str, aspect: str) -> None:
    from lora_llava.model.base import build_processor

    folder = base("qwen2", tower).folder
    config = LlavaConfig.from_pretrained(folder)
    ours = build_processor(load_tokenizer(folder), config, image_processor_of(folder, config, aspect))
    ours.save_pretrained(tmp_path)
    batch = AutoProcessor.from_pretrained(tmp_path)(images=IMAGE, text="a <image> b", return_tensors="pt")
    count = {"clip": 16, "siglip": 9}[tower]
    assert image_tokens(config) == config.image_seq_length == count
    assert int((batch["input_ids"] == config.image_token_index).sum()) == count
    assert torch.equal(batch["pixel_values"], ours.image_processor([IMAGE], return_tensors="pt")["pixel_values"])
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert torch.isfinite(model(**batch).logits).all()


def test_siglip_s_pixels_are_those_of_its_own_processor(base: Any) -> None:
    folder = base("qwen2", "siglip").folder
    config = LlavaConfig.from_pretrained(folder)
    own = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    crop = image_processor_of(folder, config, "crop")([IMAGE], return_tensors="pt")["pixel_values"]
    assert torch.equal(crop, own([IMAGE], return_tensors="pt")["pixel_values"])
    square = Image.new("RGB", (44, 44), (127, 127, 127))
    square.paste(IMAGE, (0, 12))
    pad = image_processor_of(folder, config, "pad")([IMAGE], return_tensors="pt")["pixel_values"]
    assert torch.equal(pad, own([square], return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("tower", TOWER_KINDS)
def test_features_of_a_tower_loaded_alone_are_the_stock_model_s(base: Any, tower: str) -> None:
    folder = base("llama", tower).folder
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    size = model.config.vision_config.image_size
    pixels = torch.randn(2, 3, size, size)
    alone = load_tower(folder, model.config, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        features = tower_features(alone, model.config, pixels)
        assert features.shape[1] == image_tokens(model.config)
        stock = model.get_image_features(
            pixels, model.config.vision_feature_layer, model.config.vision_feature_select_strategy
        )
        ours = model.model.multi_modal_projector(features)
    assert torch.equal(torch.stack(list(stock.pooler_output)), ours)


def adapted(folder: Path, fast: bool) -> Any:
    """A model with adapters of the same random weights, by the fast path or by stock modules."""
    model = load_base(folder, dtype="float32")
    shape = decoder_shape(model.config.text_config)
    names = tuple(shape.linears)
    peft_model = add_adapters(model, lora_config(r=4, alpha=8, targets=names, pattern=shape.pattern(names))).train()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
        elif "lora_A" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    if fast:
        use_flash_varlen(model)
        assert make_lean(model.model.language_model) > 0
    return peft_model


def rows(config: LlavaConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two samples with an image, packed in one row and padded to two; one is longer than the sliding window."""
    generator = torch.Generator().manual_seed(0)
    count = image_tokens(config)
    samples = []
    for length in (19, 4):
        ids = torch.randint(3, 250, (length,), generator=generator)
        samples.append(torch.cat([ids[:1], torch.full((count,), config.image_token_index), ids[1:]]))
    lengths = [len(sample) for sample in samples]
    labels = [torch.where(sample == config.image_token_index, -100, sample) for sample in samples]
    for label in labels:
        label[0] = -100  # the first token of a sample is never predicted
    size = config.vision_config.image_size
    pixels = torch.randn(2, 3, size, size, generator=generator)
    ends = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    packed = {
        "input_ids": torch.cat(samples)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "pixel_values": pixels,
    }
    padded = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=config.pad_token_id),
        "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in samples], batch_first=True),
        "pixel_values": pixels,
    }
    return packed, padded


@pytest.mark.parametrize(("family", "tower"), [*zip(ALL, TOWER_KINDS * 4, strict=False)])
def test_packed_and_lean_equal_padded_and_stock(base: Any, family: str, tower: str) -> None:
    """Loss and gradients of the fast path on a packed row, and of stock modules on a padded batch, in fp32."""
    folder = base(family, tower).folder
    results = []
    for fast in (True, False):
        model = adapted(folder, fast)
        batch = rows(model.config)[0 if fast else 1]
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((loss.detach(), gradients))
    (loss, ours), (reference, theirs) = results
    torch.testing.assert_close(loss, reference, rtol=0, atol=1e-5)
    assert any(gradient.abs().max() > 1e-4 for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("window", "expected"), [(4, (3, 0)), (10, None), (None, None)])
def test_the_kernels_get_the_sliding_window_of_a_longer_sample(
    monkeypatch: pytest.MonkeyPatch, window: int | None, expected: tuple[int, int] | None
) -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True

    given: dict[str, Any] = {}

    def kernel(query: torch.Tensor, *tensors: Any, **options: Any) -> torch.Tensor:
        given.update(options)
        return query

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=kernel))
    chosen = attention.Kernel("flash_attn", attention._flash_attn, "")
    monkeypatch.setattr(attention, "choose_kernel", lambda device: chosen)
    query = torch.randn(1, 2, 10, 8).bfloat16().as_subclass(OnGpu)
    ends = torch.tensor([0, 10], dtype=torch.int32)
    options: Any = {"cu_seq_lens_q": ends, "max_length_q": 10, "sliding_window": window}
    flash_varlen_attention(torch.nn.Identity(), query, query, query, None, **options)
    assert given["causal"] is True
    assert given.get("window_size") == expected


@pytest.mark.parametrize("family", ALL)
def test_lean_outputs_are_bit_equal_to_the_stock_ones(made: Path, family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / family, dtype=torch.float32).requires_grad_(False)
    states = torch.randn(2, 5, 32)
    norms = 4 if family == "gemma3_text" else 2
    per_head = 2 if family in ("qwen3", "gemma3_text") else 0
    results = []
    for lean in (False, True):
        if lean:
            assert make_lean(model) == 3 * (norms + per_head + 1) + 1
        inputs = states.clone().requires_grad_()
        output = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        output.square().sum().backward()
        results.append((output.detach(), inputs.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "tower"), PAIRS)
def test_planned_parameters_are_those_of_the_real_model(base: Any, family: str, tower: str) -> None:
    config = LlavaConfig.from_pretrained(base(family, tower).folder)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    step = Step(config, "none", 4, LoraSection(r=3), 8, 64, 32, 1, False, False)
    parts = step.parts()
    language = sum(p.numel() for p in model.model.language_model.parameters())
    head = 0 if config.text_config.tie_word_embeddings else model.lm_head.weight.numel()
    counted = parts["language model, unquantized"] + parts["embeddings, head, norms"]
    assert counted == 4 * (language + head)
    assert parts["vision tower"] == 4 * sum(p.numel() for p in model.model.vision_tower.parameters())
    assert tower_parameters(config.vision_config) == sum(p.numel() for p in model.model.vision_tower.parameters())
    pattern = step.shape.pattern(step.targets)
    trained = planned_parameters(config, lora_config(r=3, targets=step.targets, pattern=pattern))
    assert step.lora_parameters == trained["lora"]
    assert step.peak > 0


def test_all_linear_is_the_family_s_own_list(made: Path) -> None:
    names = {}
    for family in ALL:
        config = plan_model(section(made / family, made / "clip")).config.text_config
        names[family] = decoder_shape(config).check_targets("all-linear", family)
        pattern = decoder_shape(config).pattern(names[family])
        assert pattern.startswith(r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(")
    seven = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {family for family, found in names.items() if found == seven} == set(ALL) - {"phi3"}
    assert sorted(names["phi3"]) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


def test_a_target_of_another_family_is_one_line(made: Path) -> None:
    config = plan_model(section(made / "phi3", made / "clip")).config.text_config
    with pytest.raises(UserError) as caught:
        decoder_shape(config).check_targets(("o_proj", "gate_proj"), "phi3")
    message = str(caught.value)
    assert message.startswith("lora.targets: phi3 has no linear layer 'gate_proj' (did you mean \"gate_up_proj\"?)")
    assert "o_proj, qkv_proj, gate_up_proj, down_proj" in message
    assert "\n" not in message


def test_a_family_outside_the_table_works_by_stock_paths(tmp_path: Path, made: Path) -> None:
    llm = make_llm(tmp_path / "olmo2", "olmo2")
    chosen = section(llm, made / "siglip")
    config = plan_model(chosen).config
    assert "olmo2 is not in the table" in str(outside_the_table(config.text_config))
    padding_free, attention = resolve_attention("auto", torch.float32, config.text_config)
    assert (padding_free, attention) == (False, "sdpa, padded: olmo2 is not in the table of families")
    with pytest.raises(UserError, match=r"flash_varlen, but olmo2 is not in the table .*; set model.attention=sdpa"):
        resolve_attention("flash_varlen", torch.float32, config.text_config)
    folder = prepare_base(chosen, 0).folder
    model = load_base(folder, dtype="float32")
    assert make_lean(model.model.language_model) == 0
    ids = torch.randint(3, 250, (1, 9))
    own = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits[..., : own.config.vocab_size], own(ids).logits)
    assert Step(config, "nf4", 2, LoraSection(), 8, 64, 32, 1, False, True).peak > 0
