"""Data: reading rows as conversations, encoding them with labels, and collating batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_llava.data.collator import PaddedCollator
    from lora_llava.data.conversation import Conversation, EncodingError, Turn
    from lora_llava.data.encode import IGNORE_INDEX, OverlongError, encode_conversation, encode_prompt
    from lora_llava.data.images.image_sources import Pixels
    from lora_llava.data.templates.named_templates import TEMPLATES, Template, chat_template, get_template

__all__ = [
    "IGNORE_INDEX",
    "TEMPLATES",
    "Conversation",
    "EncodingError",
    "OverlongError",
    "PaddedCollator",
    "Pixels",
    "Template",
    "Turn",
    "chat_template",
    "encode_conversation",
    "encode_prompt",
    "get_template",
]

_HOMES = {
    "collator": ("PaddedCollator",),
    "conversation": ("Conversation", "EncodingError", "Turn"),
    "encode": ("IGNORE_INDEX", "OverlongError", "encode_conversation", "encode_prompt"),
    "images.image_sources": ("Pixels",),
    "templates.named_templates": ("TEMPLATES", "Template", "chat_template", "get_template"),
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: reading files does not need torch, which takes seconds to load."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"lora_llava.data.{home}"), name)
    raise AttributeError(f"module 'lora_llava.data' has no attribute {name!r}")
