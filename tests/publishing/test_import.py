"""Importing LLaVA's own checkpoints: names, shapes and logits, and no code execution."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.publishing.import_llava import import_llava
from lora_llava.publishing.merge import merge
from lora_llava.publishing.merge_source import read_source

Train = Callable[..., Path]
QUIET = Console(file=io.StringIO(), width=160)


def original_name(name: str) -> str | None:
    """Return LLaVA's name of a stock tensor; None for the vision tower, which LLaVA does not save."""
    if name.startswith("vision_tower."):
        return None
    for stock, original in {"linear_1": "0", "linear_2": "2"}.items():
        name = name.replace(f"multi_modal_projector.{stock}", f"model.mm_projector.{original}")
    return name.removeprefix("language_model.")


def original_config(parts: Path, **extra: Any) -> dict[str, Any]:
    llm = json.loads((parts / "llm" / "config.json").read_text())
    return llm | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": str(parts / "vision_tower"),
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "tokenizer_padding_side": "right",
        **extra,
    }


@pytest.fixture
def checkpoint(parts: Path, train: Train, tmp_path: Path) -> tuple[Path, Path]:
    """Write a stock LLaVA, and the same model as LLaVA's own checkpoint in two `.bin` shards."""
    base = read_source(train()).base
    folder = tmp_path / "llava-v1.5-tiny"
    folder.mkdir()
    vocabulary = json.loads((parts / "llm" / "config.json").read_text())["vocab_size"]
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        new = original_name(name)
        if new is not None:
            cut = new in ("model.embed_tokens.weight", "lm_head.weight")
            tensors[new] = (tensor[:vocabulary] if cut else tensor).clone()
    names = sorted(tensors)
    for number, half in enumerate((names[::2], names[1::2]), 1):
        torch.save({name: tensors[name] for name in half}, folder / f"pytorch_model-0000{number}-of-00002.bin")
    (folder / "config.json").write_text(json.dumps(original_config(parts)))
    for file in (parts / "llm").glob("tokenizer*"):
        shutil.copy(file, folder)
    return base, folder


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 800, (1, 20), generator=generator)
    ids[0, 4:8] = 896
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32, generator=generator)}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**batch(), use_cache=False).logits


def test_a_full_checkpoint_gives_the_stock_model_s_logits(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = checkpoint
    import_llava(folder, tmp_path / "stock", console=QUIET)
    ours, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "stock", dtype="float32", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    theirs = LlavaForConditionalGeneration.from_pretrained(base, dtype="float32")
    assert torch.equal(logits(ours), logits(theirs))
    processor = AutoProcessor.from_pretrained(tmp_path / "stock")
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == 896
    assert "ASSISTANT:" in processor.chat_template
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert not [key for key in config["text_config"] if key.startswith(("mm_", "tune_", "image_", "tokenizer_"))]


def test_a_checkpoint_with_its_own_tower_keeps_it(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = checkpoint
    tower = {
        f"model.vision_tower.{n}": t + 1 for n, t in load_file(base / "model.safetensors").items() if "vision" in n
    }
    torch.save(tower, folder / "pytorch_model-00003-of-00003.bin")
    import_llava(folder, tmp_path / "stock", console=QUIET)
    ours = load_file(tmp_path / "stock" / "model.safetensors")
    for name, tensor in tower.items():
        assert torch.equal(ours[name.removeprefix("model.vision_tower.")], tensor)


def test_a_linear_projector_of_llava_1_0_is_imported(
    checkpoint: tuple[Path, Path], parts: Path, tmp_path: Path
) -> None:
    _, folder = checkpoint
    for file in folder.glob("*.bin"):
        content = torch.load(file)
        linear = {name: tensor for name, tensor in content.items() if "mm_projector" not in name}
        for kind in ("weight", "bias"):
            if f"model.mm_projector.0.{kind}" in content:
                linear[f"model.mm_projector.{kind}"] = content[f"model.mm_projector.0.{kind}"]
        torch.save(linear, file)
    config = original_config(parts)
    del config["mm_projector_type"]  # LLaVA 1.0 had one kind and did not record it
    (folder / "config.json").write_text(json.dumps(config))
    import_llava(folder, tmp_path / "stock", console=QUIET)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock", dtype="float32")
    assert model.config.projector_hidden_act == "linear"
    assert torch.equal(model.model.multi_modal_projector.linear_2.weight, torch.eye(64))


@pytest.fixture
def lora_folder(parts: Path, train: Train, tmp_path: Path) -> tuple[Path, Path]:
    """Train a run, and write the same adapter as LLaVA's LoRA folder."""
    run = train(rate=0.02)
    folder = tmp_path / "llava-lora"
    folder.mkdir()
    adapter, other = {}, {}
    for name, tensor in load_file(run / "adapter_model.safetensors").items():
        if ".lora_" in name:
            adapter[name.replace("model.language_model.layers", "model.layers")] = tensor
        else:
            short = name.split("multi_modal_projector.")[1].replace("linear_1", "0").replace("linear_2", "2")
            other[f"base_model.model.model.mm_projector.{short}"] = tensor
    torch.save(adapter, folder / "adapter_model.bin")
    torch.save(other, folder / "non_lora_trainables.bin")
    settings = {
        "base_model_name_or_path": str(parts / "llm"),
        "bias": "none",
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "peft_type": "LORA",
        "r": 4,
        "task_type": "CAUSAL_LM",
        "modules_to_save": None,
        "target_modules": ["up_proj", "down_proj", "gate_proj", "k_proj", "q_proj", "v_proj", "o_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(original_config(parts)))
    return run, folder


def test_a_lora_folder_gives_the_run_s_logits_and_merges(lora_folder: tuple[Path, Path], tmp_path: Path) -> None:
    run, folder = lora_folder
    import_llava(folder, tmp_path / "run", console=QUIET)

    def adapted(adapter: Path) -> torch.Tensor:
        base = LlavaForConditionalGeneration.from_pretrained(read_source(adapter).base, dtype="float32")
        return logits(PeftModel.from_pretrained(base, str(adapter)))

    assert torch.equal(adapted(tmp_path / "run"), adapted(run))
    report = merge(tmp_path / "run", tmp_path / "merged", dtype="float32", console=QUIET)
    assert report["adapter_on_bf16_base"]["max_logit_difference"] <= 1e-4
    assert report["prompts_from"] == "0 from the run's data (it has no recipe), 8 built-in"


def test_a_lora_folder_on_a_complete_llava_needs_it_as_base(
    lora_folder: tuple[Path, Path], checkpoint: tuple[Path, Path], tmp_path: Path
) -> None:
    _, folder = lora_folder
    base, original = checkpoint
    with pytest.raises(UserError, match="a complete LLaVA; import that first, then name the result with --base"):
        import_llava(folder, tmp_path / "run", llm=str(original), console=QUIET)
    import_llava(folder, tmp_path / "run", base=str(base), console=QUIET)
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.resolve())


class Attack:
    """An object that touches a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_code_in_a_pickle_is_rejected_and_not_run(name: str, lora_folder: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = lora_folder
    torch.save({"x": Attack(tmp_path / "ran")}, folder / name)
    with pytest.raises(UserError, match="is not a file of tensors"):
        import_llava(folder, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


def rename(file: Path, old: str, new: str) -> None:
    content = torch.load(file)
    torch.save({name.replace(old, new): tensor for name, tensor in content.items()}, file)


def test_tensors_and_settings_that_cannot_be_converted_are_named(
    lora_folder: tuple[Path, Path], parts: Path, tmp_path: Path
) -> None:
    _, folder = lora_folder
    good = (folder / "adapter_model.bin").read_bytes()

    def assert_rejected(message: str) -> None:
        with pytest.raises(UserError, match=message):
            import_llava(folder, tmp_path / "run", console=QUIET)
        assert not (tmp_path / "run").exists()

    rename(folder / "adapter_model.bin", "model.layers.1.mlp.up_proj", "model.vision_tower.q_proj")
    assert_rejected(r"base_model\.model\.model\.vision_tower\.q_proj\.lora_A\.weight is not an adapter of a language")
    (folder / "adapter_model.bin").write_bytes(good)
    content = torch.load(folder / "adapter_model.bin")
    content.popitem()
    torch.save(content, folder / "adapter_model.bin")
    assert_rejected("27 LoRA matrices; .* on 2 layers would be 28: the layers have different adapters")
    content = torch.load(io.BytesIO(good))
    content = {name: torch.zeros(4, 7) if "lora_A" in name and "up_proj" in name else t for name, t in content.items()}
    torch.save(content, folder / "adapter_model.bin")
    assert_rejected(
        r"llava-lora does not fit .*layers\.0\.mlp\.up_proj\.lora_A\.weight has shape 4 x 7, not 4 x 64 \(.* 2 of 32\)"
    )
    (folder / "adapter_model.bin").write_bytes(good)
    rename(folder / "non_lora_trainables.bin", "mm_projector.0", "embed_tokens")
    assert_rejected(r"embed_tokens\.\w+ was trained besides LoRA and projector")
    (folder / "config.json").write_text(json.dumps(original_config(parts, mm_use_im_start_end=True)))
    assert_rejected("mm_use_im_start_end is true")
    (folder / "config.json").write_text(json.dumps(original_config(parts, mm_projector_type="mlp3x_gelu")))
    assert_rejected("mm_projector_type is mlp3x_gelu; only linear and mlp2x_gelu are supported")


def test_a_wrong_shape_or_name_in_a_checkpoint_is_named(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = checkpoint
    file = folder / "pytorch_model-00001-of-00002.bin"
    good = file.read_bytes()
    content = torch.load(file)
    name = next(name for name in content if name.startswith("model.layers.0"))
    torch.save(content | {name: torch.zeros(3, 3)}, file)
    with pytest.raises(UserError, match=rf"{name} has shape \(3, 3\), and its config\.json requires"):
        import_llava(folder, tmp_path / "stock", console=QUIET)
    torch.save(content | {"model.resampler.weight": torch.zeros(3)}, file)
    with pytest.raises(UserError, match=r"model\.resampler\.weight is not a tensor of a LLaVA"):
        import_llava(folder, tmp_path / "stock", console=QUIET)
    del content[name]
    torch.save(content, file)
    with pytest.raises(UserError, match=r"is missing \(1 tensors in all\)"):
        import_llava(folder, tmp_path / "stock", console=QUIET)
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match="is not a file of tensors"):
        import_llava(folder, tmp_path / "stock", console=QUIET)
    assert not (tmp_path / "stock").exists()


def test_start_from_an_original_checkpoint_names_the_verb(
    checkpoint: tuple[Path, Path], stage2_content: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    stage2_content["model"] = {"start_from": {"llava": str(checkpoint[1])}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(stage2_content))
    assert main("finetune", [str(tmp_path / "recipe.yaml"), "--dry-run"]) == 2
    assert "is a checkpoint in LLaVA's original format; convert it with `lora-llava import`" in capsys.readouterr().err
