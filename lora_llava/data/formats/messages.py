"""Rows of chat messages as transformers and OpenAI write them, under `messages`."""

from __future__ import annotations

from lora_llava.data.formats.shared import ChatFormat


class Messages(ChatFormat):
    """`{"id", "images", "messages": [{"role", "content"}, ...]}`."""

    precedence = 20
    summary = "messages"
    keys = ("messages",)


FORMAT = Messages()
