"""The base folder: stock, exact, written once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, LlamaForCausalLM, LlavaForConditionalGeneration

from lora_llava.core.errors import UserError
from lora_llava.model.base import BaseParts, assembled_config, build_base, pad_vocabulary
from lora_llava.model.families.tower_families import image_processor_of
from lora_llava.model.start import prepare_base
from lora_llava.model.weights.parts import load_part
from lora_llava.model.weights.tensor_files import iterate_tensors
from lora_llava.recipe import Recipe


@pytest.fixture
def base(stage2: Recipe) -> Path:
    return Path(prepare_base(stage2.model, 0).name)


def test_is_a_stock_llava_with_every_tensor_of_its_parts(base: Path, parts: Path) -> None:
    model, info = LlavaForConditionalGeneration.from_pretrained(base, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = model.state_dict()
    for name, tensor in iterate_tensors(parts / "llm"):
        ours = state["lm_head.weight" if name == "lm_head.weight" else f"model.language_model.{name[6:]}"]
        assert torch.equal(ours[: tensor.shape[0]], tensor), name
    tower = dict(iterate_tensors(parts / "vision_tower"))
    ours = {name.removeprefix("model.vision_tower."): t for name, t in state.items() if "vision_tower" in name}
    assert set(ours) == {name.removeprefix("vision_model.") for name in tower}
    assert all(torch.equal(ours[name.removeprefix("vision_model.")], tensor) for name, tensor in tower.items())


def test_text_only_logits_over_the_old_ids_are_those_of_the_language_model(base: Path, parts: Path) -> None:
    ids = torch.randint(3, 800, (2, 17), generator=torch.Generator().manual_seed(0))
    llm = LlamaForCausalLM.from_pretrained(parts / "llm", dtype=torch.float32)
    llava = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        old, new = llm(ids).logits, llava(input_ids=ids).logits
    torch.testing.assert_close(new[..., : old.shape[-1]], old, rtol=0, atol=1e-5)


def test_vocabulary_has_image_and_pad_and_is_a_multiple_of_64(base: Path, parts: Path) -> None:
    old = json.loads((parts / "llm" / "config.json").read_text())["vocab_size"]
    config = json.loads((base / "config.json").read_text())
    processor = AutoProcessor.from_pretrained(base)
    assert config["image_token_index"] == old == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert processor.tokenizer.pad_token_id == old + 1
    assert config["text_config"]["vocab_size"] % 64 == 0
    assert old + 2 <= config["text_config"]["vocab_size"] < old + 2 + 64


def test_new_rows_are_the_mean_of_the_old() -> None:
    matrix = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert pad_vocabulary(matrix, 4).tolist() == [[1, 2], [3, 6], [2, 4], [2, 4]]


def test_vicuna_gets_the_ids_and_size_of_llava_hf() -> None:
    llm = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 64, "num_attention_heads": 2}
    config = assembled_config(llm, {"image_size": 336, "patch_size": 14}, "mlp2x_gelu")
    assert (config.image_token_index, config.pad_token_id, config.text_config.vocab_size) == (32000, 32001, 32064)
    assert config.image_seq_length == 576


def test_is_written_once_and_keyed_by_its_parts(stage2: Recipe, base: Path) -> None:
    written = (base / "model.safetensors").stat().st_mtime_ns
    assert Path(prepare_base(stage2.model, 0).name) == base
    assert (base / "model.safetensors").stat().st_mtime_ns == written
    assert Path(prepare_base(stage2.model, 1).name) != base  # another fresh projector


def test_a_failure_leaves_no_partial_folder(parts: Path, base: Path, monkeypatch: Any) -> None:
    llm, tower = (
        load_part(str(parts / "llm"), None, "llm"),
        load_part(str(parts / "vision_tower"), None, "vision_tower"),
    )
    before = sorted(base.parent.iterdir())

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        build_base(BaseParts("a", "b", "c", "d", "linear", None, 5), llm, tower, None)
    assert sorted(base.parent.iterdir()) == before


def test_weights_published_as_bin_give_the_same_base(stage2: Recipe, base: Path, parts: Path, tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    llm.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (llm / name).write_bytes((parts / "llm" / name).read_bytes())
    torch.save(dict(iterate_tensors(parts / "llm")), llm / "pytorch_model.bin")
    model = stage2.model.model_copy(update={"llm": str(llm)})
    other = Path(prepare_base(model, 0).name)
    assert other != base
    ours, theirs = (dict(iterate_tensors(folder)) for folder in (base, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_linear_projector_is_exactly_w(stage2: Recipe) -> None:
    model = stage2.model.model_copy(update={"projector_type": "linear"})
    llava = LlavaForConditionalGeneration.from_pretrained(prepare_base(model, 0).name, dtype=torch.float32)
    projector = llava.model.multi_modal_projector
    features = torch.randn(3, 4, 32)
    assert torch.equal(projector(features), projector.linear_1(features))


def test_a_pickle_with_code_is_refused(tmp_path: Path, parts: Path, stage2: Recipe) -> None:
    llm = tmp_path / "llm"
    llm.mkdir()
    (llm / "config.json").write_bytes((parts / "llm" / "config.json").read_bytes())
    torch.save({"model.x": Path("code")}, llm / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a file of tensors"):
        dict(iterate_tensors(llm))


def test_another_models_tokenizer_is_refused(tmp_path: Path, parts: Path, stage2: Recipe) -> None:
    llm = tmp_path / "llm"
    llm.mkdir()
    for file in (parts / "llm").iterdir():
        (llm / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_tokens(["surplus"])
    tokenizer.save_pretrained(llm)
    with pytest.raises(UserError, match="the tokenizer belongs to another model"):
        prepare_base(stage2.model.model_copy(update={"llm": str(llm)}), 0)


def test_padding_to_square_is_llavas(parts: Path, base: Path) -> None:
    """llava/mm_utils.py, expand2square: CLIP's mean colour, then CLIP's preprocessing."""
    import numpy as np
    from PIL import Image
    from transformers import CLIPImageProcessorPil, LlavaConfig

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (20, 44, 3), dtype=np.uint8))
    config = LlavaConfig.from_pretrained(base)
    ours = image_processor_of(base, config, "pad")([image], return_tensors="pt")["pixel_values"]
    square = Image.new("RGB", (44, 44), (122, 116, 104))
    square.paste(image, (0, 12))
    clip = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    assert torch.equal(ours, clip([square], return_tensors="pt")["pixel_values"])
    crop = image_processor_of(base, config, "crop")([image], return_tensors="pt")["pixel_values"]
    assert torch.equal(crop, clip([image], return_tensors="pt")["pixel_values"])
