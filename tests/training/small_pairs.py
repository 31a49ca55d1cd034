"""Small language models with the chat templates and the kinds of tokenizers that people download."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import trl
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_llava.demo.build import build_tokenizer
from tests.model.small_families import SIZES, SPARE_ROWS, SPECIAL

TRL = Path(trl.__file__).parent / "chat_templates"
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
"""Mistral-7B-Instruct-v0.1's, which has no place for a system text."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORDS += r"|\s*[\r\n]+|\s+(?!\S)|\s+"


class Kind(NamedTuple):
    """A language model that people download.

    Attributes:
        family: Its family in `small_families`.
        template: Its chat template; None for Vicuna, which has none.
        special: Its special tokens; empty for a tokenizer such as Llama 2's.
        eos: The token that ends its answers, or another that its tokenizer names.
        bos: The token that it puts in front of every text, if any.
    """

    family: str
    template: Callable[[], str] | None
    special: tuple[str, ...] = ()
    eos: str = "</s>"
    bos: str | None = None


def _of_trl(name: str) -> Callable[[], str]:
    return lambda: (TRL / f"{name}.jinja").read_text(encoding="utf-8")


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA_3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_PHI_3 = ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_GEMMA_3 = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
KINDS = {
    "vicuna": Kind("llama", None),
    "llama3": Kind("llama", _of_trl("llama3_1"), _LLAMA_3, "<|eot_id|>", "<|begin_of_text|>"),
    "smollm2": Kind("smollm2", lambda: SMOLLM2, _CHATML, "<|im_end|>"),
    "mistral": Kind("mistral", lambda: MISTRAL),
    "qwen2": Kind("qwen2", _of_trl("qwen2_5"), _CHATML, "<|im_end|>"),
    "qwen3": Kind("qwen3", _of_trl("qwen3"), (*_CHATML, "<think>", "</think>"), "<|im_end|>"),
    "phi3": Kind("phi3", _of_trl("phi3"), _PHI_3, "<|endoftext|>"),
    "gemma3_text": Kind("gemma3_text", _of_trl("gemma3"), _GEMMA_3, "<eos>", "<bos>"),
}


def make_model(folder: Path, name: str) -> Path:
    """Save a random language model with its tokenizer and chat template, as a folder downloaded from the Hub."""
    kind = KINDS[name]
    tokenizer = _tokenizer(kind) if kind.special else build_tokenizer(0)
    tokenizer.save_pretrained(folder)
    if kind.template is not None:
        (folder / "chat_template.jinja").write_text(kind.template(), encoding="utf-8")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    rows = len(tokenizer) + SPARE_ROWS.get(kind.family, 0)
    positions = {"max_position_embeddings": 2048, "vocab_size": rows}
    settings = SIZES | SPECIAL.get(kind.family, {}) | ids | positions
    torch.manual_seed(0)
    config = CONFIG_MAPPING["llama" if kind.family == "smollm2" else kind.family](**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:  # else a model with a tied head repeats the prompt's last token
                parameter.mul_(10)
    model.save_pretrained(folder)
    return folder


def _tokenizer(kind: Kind) -> Any:
    """Train a byte-level BPE with a family's special tokens."""
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(kind.special), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["Which colour is shown? The colour is red.", json.dumps(list(range(99)))], trainer)
    if kind.bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{kind.bos} $A", special_tokens=[(kind.bos, backend.token_to_id(kind.bos))]
        )
    names = {"bos_token": kind.bos} if kind.bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=kind.eos, **names)
