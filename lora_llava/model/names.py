"""One name for each weight, whatever library wrote the checkpoint."""

from __future__ import annotations

_PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
"""From llava-hf's names to transformers' (transformers/conversion_mapping.py, `llava`)."""
PROJECTOR_PREFIX = "model.multi_modal_projector."
COMPONENTS = {
    "llm": ("model.language_model.", "lm_head."),
    "vision_tower": ("model.vision_tower.",),
    "projector": (PROJECTOR_PREFIX,),
}


def canonical_name(name: str) -> str:
    """A weight's name in the model of the transformers that is installed.

    Args:
        name: As in a checkpoint, llava-hf's first layout or transformers 5's own.

    Returns:
        For instance `model.language_model.layers.0.self_attn.q_proj.weight`.
    """
    name = name.replace(".vision_model.", ".")  # transformers 5 dropped that level
    for old, new in _PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def component_of(name: str) -> str | None:
    """The component a canonical name belongs to: `llm`, `vision_tower` or `projector`."""
    return next((part for part, prefixes in COMPONENTS.items() if name.startswith(prefixes)), None)
