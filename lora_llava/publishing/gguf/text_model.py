"""The language model as GGUF: metadata, and tensors in llama.cpp's names and order of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from lora_llava.core.errors import UserError
from lora_llava.model.weights.tensor_files import LazyTensor
from lora_llava.publishing.gguf.gguf_source import GgufSource

_PREFIX = "model.language_model."


@dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp knows a family of language models.

    Attributes:
        arch: Its architecture there.
        interleaved: Whether the two halves of a head's rotated dimensions are interleaved there, as in Meta's weights;
            transformers has them one after the other.
    """

    arch: str
    interleaved: bool


GGUF_FAMILIES = {
    "llama": GgufFamily("llama", True),
    "mistral": GgufFamily("llama", True),
    "qwen2": GgufFamily("qwen2", False),
}
"""By model_type; see llama.cpp's conversion/llama.py and conversion/qwen.py."""


def gguf_family(text: PreTrainedConfig) -> GgufFamily:
    """Return a language model's family.

    Raises:
        UserError: If the writer does not know it, or llama.cpp would compute something else.
    """
    kind = text.model_type
    if kind not in GGUF_FAMILIES:
        raise UserError(
            f"--format gguf: the language model is a {kind!r} model; the writer knows {', '.join(GGUF_FAMILIES)}. "
            "Merge the run, and convert the folder with llama.cpp's convert_hf_to_gguf.py"
        )
    if (act := getattr(text, "hidden_act", "silu")) != "silu":
        raise UserError(f"--format gguf: {kind} with hidden_act {act!r}; llama.cpp computes silu for this family")
    if getattr(text, "use_sliding_window", False):
        raise UserError(f"--format gguf: {kind} with use_sliding_window; llama.cpp computes full attention for it")
    if (rope := _rope(text)[0]) not in ("default", "linear", "llama3"):
        raise UserError(f"--format gguf: {kind} with rope_type {rope!r}; the writer knows default, linear and llama3")
    return GGUF_FAMILIES[kind]


def _rope(text: PreTrainedConfig) -> tuple[str, dict[str, Any]]:
    """Return the type and the parameters of the position embedding."""
    found = dict(getattr(text, "rope_parameters", None) or {})
    return str(found.get("rope_type") or "default"), found


def head_size(text: PreTrainedConfig) -> int:
    """Return the dimensions of an attention head."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def context_length(text: PreTrainedConfig) -> int:
    """Return the context length; at most a sliding window, which llama.cpp's `llama` does not apply."""
    window = getattr(text, "sliding_window", None)
    return min(text.max_position_embeddings, window) if window else int(text.max_position_embeddings)


def add_text_metadata(writer: Any, text: PreTrainedConfig, name: str) -> None:
    """Write the metadata of the language model, in the keys of llama.cpp's converter.

    Args:
        writer: A `gguf.GGUFWriter`.
        text: The language model's config.
        name: The model's name.
    """
    from gguf import RopeScalingType

    rope, parameters = _rope(text)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(context_length(text))
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    writer.add_rope_dimension_count(head_size(text))
    writer.add_rope_freq_base(float(parameters.get("rope_theta", 10000.0)))
    if head_size(text) * text.num_attention_heads != text.hidden_size:
        writer.add_key_length(head_size(text))
        writer.add_value_length(head_size(text))
    if rope == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(parameters["factor"]))


def text_tensors(source: GgufSource, family: GgufFamily) -> list[LazyTensor]:
    """List the language model's tensors as llama.cpp expects them.

    Raises:
        UserError: For a weight that has no place in this architecture.
    """
    import gguf

    text = source.config.text_config
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    names = gguf.get_tensor_name_map(arch, text.num_hidden_layers)
    tied = source.config.tie_word_embeddings or text.tie_word_embeddings
    found = []
    for name, tensor in source.tensors.items():
        if not name.startswith((_PREFIX, "lm_head.")) or (tied and name == "lm_head.weight"):
            continue
        short = name.replace(_PREFIX, "model.")
        if short.endswith("rotary_emb.inv_freq"):
            continue
        new = names.get_name(short, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise UserError(
                f"--format gguf: llama.cpp's {family.arch} has no place for {name}; convert the merged folder "
                "with llama.cpp's own script"
            )
        found.append(replace(tensor, name=new, load=_loader(tensor, short, text, family)))
    factors = _llama3_factors(text)
    if factors is not None:
        found.append(LazyTensor("rope_freqs.weight", tuple(factors.shape), lambda: factors))
    return found


def _loader(tensor: LazyTensor, name: str, text: PreTrainedConfig, family: GgufFamily) -> Callable[[], torch.Tensor]:
    layer = name.rsplit(".", 2)[-2]
    heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}.get(layer)
    if not family.interleaved or heads is None:
        return tensor.load
    return lambda: interleave_halves(tensor.load(), heads)


def interleave_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleave the two halves of each head's rows, as llama.cpp's `LlamaModel.permute`.

    Args:
        weight: Shape (heads * size, columns), or (heads * size,) for a bias.
        heads: Number of heads.

    Returns:
        The same shape: rows 0, size/2, 1, size/2 + 1, ... of each head.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def _llama3_factors(text: PreTrainedConfig) -> torch.Tensor | None:
    """Return the divisors of the rotation frequencies of Llama 3.1's rope, shape (size / 2,); None for others.

    The formula: llama.cpp, conversion/llama.py, `generate_extra_tensors`; transformers, `_compute_llama3_parameters`.
    """
    rope, parameters = _rope(text)
    if rope != "llama3":
        return None
    size, base = head_size(text), float(parameters.get("rope_theta", 10000.0))
    factor, low, high = (float(parameters[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    old = parameters["original_max_position_embeddings"]
    factors = []
    for frequency in 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size):
        length = 2 * math.pi / float(frequency)
        if length < old / high:
            factors.append(1.0)
        elif length > old / low:
            factors.append(factor)
        else:
            smooth = (old / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)
