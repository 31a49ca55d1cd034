"""Canonical names of weights, for checkpoints of any library."""

from __future__ import annotations

from collections.abc import Container

from transformers import LlavaConfig

_PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
}
"""From llava-hf's names to transformers' (transformers/conversion_mapping.py, `llava` and `llava_next`)."""
_TIED = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
ADAPTER_FILE = "adapter_model.safetensors"
"""PEFT's name for the file of an adapter's weights."""
PROJECTOR_PREFIX = "model.multi_modal_projector."
NEWLINE_NAME = "model.image_newline"
"""LLaVA-1.6's vector at the end of each line of patches, under the name that LLaVA's own checkpoints have too."""
COMPONENTS = {
    "llm": ("model.language_model.", "lm_head."),
    "vision_tower": ("model.vision_tower.",),
    "projector": (PROJECTOR_PREFIX, NEWLINE_NAME),
}


def canonical_name(name: str) -> str:
    """Return a weight's name in the installed transformers' model.

    Args:
        name: Name in a checkpoint, in llava-hf's first layout or that of transformers 5.

    Returns:
        For instance `model.language_model.layers.0.self_attn.q_proj.weight`.
    """
    name = name.replace(".vision_model.", ".")  # transformers 5 dropped that level
    for old, new in _PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def stored_name(name: str, stored: Container[str], config: LlavaConfig) -> str:
    """Return the name under which a checkpoint stores a weight; a tied head is stored only as the embeddings.

    Args:
        name: A canonical name.
        stored: The checkpoint's canonical names.
        config: The model's configuration, with the tying.
    """
    tied = config.tie_word_embeddings or config.text_config.tie_word_embeddings
    return _TIED[name] if tied and name in _TIED and name not in stored else name


def component_of(name: str) -> str | None:
    """Return the component of a canonical name: `llm`, `vision_tower`, `projector`, or None."""
    return next((part for part, prefixes in COMPONENTS.items() if name.startswith(prefixes)), None)
