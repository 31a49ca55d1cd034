"""Data: adapters to conversations, encoding with labels, collation."""

from lora_llava.data.collator import PaddedCollator
from lora_llava.data.conversation import Conversation, EncodingError, Turn
from lora_llava.data.encode import IGNORE_INDEX, OverlongError, encode_conversation, encode_prompt
from lora_llava.data.images import Pixels
from lora_llava.data.templates import TEMPLATES, Template, chat_template, get_template

__all__ = [
    "IGNORE_INDEX", "TEMPLATES", "Conversation", "EncodingError", "OverlongError", "PaddedCollator", "Pixels",
    "Template", "Turn", "chat_template", "encode_conversation", "encode_prompt", "get_template",
]  # fmt: skip
