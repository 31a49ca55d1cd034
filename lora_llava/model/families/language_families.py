"""The families of language models: one table, and the checks of a language model's config.json.

A family in the table trains by the fast path. Any other causal language model of transformers works by stock paths, if
stock `LlavaForConditionalGeneration` computes its logits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lora_llava.core.errors import UserError


@dataclass(frozen=True)
class LanguageFamily:
    """What the fast path needs to know of a family.

    Attributes:
        model_type: Its name in transformers.
        norm: Class of its norms, which scale by the root of the mean square.
        mlp: Class of its MLPs, which compute down(act(gate(x)) * up(x)).
        fused_mlp: Whether gate and up are one matrix, `gate_up_proj`.
    """

    model_type: str
    norm: str
    mlp: str
    fused_mlp: bool = False


FAMILIES = {
    family.model_type: family
    for family in (
        LanguageFamily("llama", "LlamaRMSNorm", "LlamaMLP"),
        LanguageFamily("mistral", "MistralRMSNorm", "MistralMLP"),
        LanguageFamily("qwen2", "Qwen2RMSNorm", "Qwen2MLP"),
        LanguageFamily("qwen3", "Qwen3RMSNorm", "Qwen3MLP"),
        LanguageFamily("phi3", "Phi3RMSNorm", "Phi3MLP", fused_mlp=True),
        LanguageFamily("gemma3_text", "Gemma3RMSNorm", "Gemma3MLP"),
    )
}
"""By model_type. SmolLM2 is a llama. Every one has `model.layers` and `lm_head`, packs samples exactly with its sliding
window if it has one, and has no softcap."""

_MODALITIES = ("vision", "audio", "text", "thinker")
_SCALES = {
    "final_logit_softcapping": (None,),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "lm_head_multiplier": (None, 1, 1.0),
}
"""Settings that change the logits after the head, and the values that change nothing."""
_ELSEWHERE = "which stock LlavaForConditionalGeneration does not do: the model's text would differ"


def family_of(text: PreTrainedConfig) -> LanguageFamily | None:
    """Return the family of a language model's configuration; None if it is not in the table."""
    return FAMILIES.get(text.model_type)


def read_text_config(content: Mapping[str, Any], field: str) -> PreTrainedConfig:
    """Return the configuration of a language model, checked.

    Args:
        content: Its config.json.
        field: The recipe's field, for messages.

    Raises:
        UserError: If stock `LlavaForConditionalGeneration` cannot hold it, or would compute other logits.
    """
    kind = content.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{field}: config.json has no model_type; name a language model of transformers")
    parts = [name for name in content if str(name).endswith("_config") and name.split("_")[0] in _MODALITIES]
    parts += list(getattr(CONFIG_MAPPING[kind], "sub_configs", {})) if kind in CONFIG_MAPPING else []
    if parts:
        raise UserError(
            f"{field} is a {kind!r} model with a {parts[0]}, which is more than a language model; name a text-only one"
        )
    if quantized := content.get("quantization_config"):
        how = quantized.get("quant_method", "unnamed") if isinstance(quantized, dict) else quantized
        raise UserError(f"{field}: its weights are quantized ({how}); name the model they were made from")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"{field} is a {kind!r} model, which the installed transformers does not know")
    config = build_config(CONFIG_MAPPING[kind], content, f"{field}: config.json is not a {kind} model's")
    check_text_config(config, field)
    return config


def build_config(kind: Any, content: Mapping[str, Any], problem: str) -> Any:
    """Return a configuration of transformers from the content of a config.json.

    Args:
        kind: Its class.
        content: The content.
        problem: The beginning of the error's message.

    Raises:
        UserError: If a value is of another type, missing or out of range.
    """
    try:
        return kind(**content)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{problem}: {_one_line(error)}") from None


def check_text_config(config: PreTrainedConfig, field: str) -> None:
    """Refuse a language model whose logits stock `LlavaForConditionalGeneration` would not compute.

    Raises:
        UserError: Naming what is missing.
    """
    kind = config.model_type
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{field} is a {kind!r} model, which is not a causal language model; name one")
    for name, harmless in _SCALES.items():
        if (value := getattr(config, name, None)) not in harmless:
            raise UserError(f"{field}: {kind} has {name} {value}, {_ELSEWHERE}; name another model")
    if getattr(config, "use_bidirectional_attention", False):
        raise UserError(f"{field}: {kind} has use_bidirectional_attention; it does not generate text; name another")
    if kind not in FAMILIES:
        _check_unknown(config, field)


_PROBLEMS: dict[str, str | None] = {}
"""What was found of models that are not in the table, by their configuration."""


def _check_unknown(config: PreTrainedConfig, field: str) -> None:
    """Check the structure of a model that is not in the table, on the meta device."""
    key = config.to_json_string(use_diff=False)
    if key not in _PROBLEMS:
        try:
            copied = copy.deepcopy(config)
            copied.pad_token_id = None  # ours replaces it
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(copied)
            _PROBLEMS[key] = _structural_problem(model)
        except Exception as error:  # other families' code can raise anything
            _PROBLEMS[key] = f"cannot be built from its config.json: {_one_line(error)}"
    if (problem := _PROBLEMS[key]) is not None:
        raise UserError(f"{field}: {config.model_type} {problem}; name another model")


def _structural_problem(model: Any) -> str | None:
    """Return what a LLaVA of this language model lacks, or None."""
    body, head = getattr(model, "model", None), getattr(model, "lm_head", None)
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return "has no `model.layers`, which adapters and checkpointing need"
    if not isinstance(getattr(body, "embed_tokens", None), nn.Embedding):
        return "has no `model.embed_tokens`, which images are written into"
    if not any(isinstance(module, nn.Linear) for module in layers.modules()):
        return "has no nn.Linear in its layers, which adapters need"
    if type(head) is not nn.Linear or head.bias is not None:
        return "has no `lm_head` of one matrix, as stock LlavaForConditionalGeneration has"
    if not model.supports_gradient_checkpointing:
        return "does not support gradient checkpointing"
    return None if _head_is_plain(model) else f"changes its logits after the head, {_ELSEWHERE}"


def _head_is_plain(model: Any) -> bool:
    """Check that the logits are the head's output, by a body that returns known states and a head that keeps them."""
    states = torch.linspace(-90, 90, 6).view(1, 3, 2)

    class Body(nn.Module):
        def forward(self, *_: Any, **__: Any) -> Any:
            from transformers.modeling_outputs import MoeModelOutputWithPast

            return MoeModelOutputWithPast(last_hidden_state=states, router_logits=None)

    model.model, model.lm_head = Body(), nn.Identity()
    try:
        logits = model(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False).logits
    except Exception:  # it does more than the head with what its body returns
        return False
    return torch.equal(logits, states)


def _one_line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing or unknown"
    text = " ".join(str(error).split()).partition(" Should contain one of ")[0]  # transformers lists 500 model types
    return text or type(error).__name__


def attention_problem(text: PreTrainedConfig) -> str | None:
    """Return why a language model's samples cannot be packed, or None if packing is exact."""
    if family_of(text) is None:
        return f"{text.model_type} is not in the table of families"
    for name in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(text, name, None) is not None:
            return f"{text.model_type} has {name}, which packed attention does not compute"
    return None


def outside_the_table(text: PreTrainedConfig) -> str | None:
    """Return a warning about a language model that is not in the table; None for one that is."""
    if family_of(text) is not None:
        return None
    return (
        f"{text.model_type} is not in the table of families ({', '.join(FAMILIES)}): it trains by stock paths, padded "
        "and with more memory, and has not been tried"
    )
