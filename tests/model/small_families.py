"""Tiny random language models of every family and towers of every kind, as folders with real tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from lora_llava.demo.build import build_tokenizer
from lora_llava.recipe.schema import ModelSection

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {"bos_token_id": 1},
    "smollm2": {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}},
    "mistral": {"sliding_window": 6, "head_dim": 8},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"head_dim": 16},
    "phi3": {"sliding_window": 6},
    "gemma3_text": {
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
"""What is unusual in each family: windows shorter than the samples, tied heads, other head sizes, spare rows."""
SPARE_ROWS = {"qwen2": 40, "qwen3": 1, "gemma3_text": 40}
ALL = list(SPECIAL)
TOWER_KINDS = ["clip", "siglip"]
CORPUS = ["USER: What is shown? ASSISTANT: the colour red.", "one two three four five six seven", "a b c d e f 0 1 2 3"]


def byte_tokenizer(special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")) -> Any:
    """A byte-level BPE tokenizer that adds no BOS, such as Qwen's and SmolLM2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    names = {"bos_token": special[0], "unk_token": special[0]} if len(special) < 4 else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[2], pad_token=special[0], **names)


def make_llm(folder: Path, family: str, *, demo_tokenizer: bool = False, **more: Any) -> Path:
    """Save a random language model of a family in float32, and a tokenizer of its kind or the demo's."""
    if family == "llama" or demo_tokenizer:
        tokenizer = build_tokenizer(0)
    elif family == "qwen2":
        tokenizer = byte_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision|>"))
    else:
        tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    kind = "llama" if family == "smollm2" else family
    settings = SIZES | SPECIAL.get(family, {}) | {"vocab_size": len(tokenizer) + SPARE_ROWS.get(family, 0)} | more
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases of a trained model are not 1 and 0
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" in name:
                parameter.mul_(10)
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # bases are stored in bfloat16
    model.save_pretrained(folder)
    return folder


def make_tower(folder: Path, kind: str) -> Path:
    """Save a random CLIP tower, or a complete SigLIP with its text model and image processor, as on the Hub."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "patch_size": 8,
    }
    torch.manual_seed(1)
    model: Any
    if kind == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(image_size=32, projection_dim=16, **sizes))
    else:
        text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = SiglipModel(
            SiglipConfig(text_config=text | {"vocab_size": 64}, vision_config=sizes | {"image_size": 28})
        )
        (folder).mkdir(parents=True, exist_ok=True)
        (folder / "preprocessor_config.json").write_text(
            '{"image_processor_type": "SiglipImageProcessor", "image_mean": [0.5, 0.5, 0.5], "image_std": '
            '[0.5, 0.5, 0.5], "resample": 3, "size": {"height": 28, "width": 28}}'
        )
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def section(llm: Path, tower: Path) -> ModelSection:
    """The model section of a language model and a tower."""
    content = {"llm": str(llm), "vision_tower": str(tower), "start_from": {"untrained": True}}
    return ModelSection.model_validate(content)
