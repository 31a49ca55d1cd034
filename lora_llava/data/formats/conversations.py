"""Rows of LLaVA's JSON and of ShareGPT: a list of messages under `conversations`."""

from __future__ import annotations

from lora_llava.data.formats.shared import ChatFormat


class Conversations(ChatFormat):
    """`{"id", "image", "conversations": [{"from", "value"}, ...]}`, also with the key `conversation`."""

    precedence = 10
    summary = "LLaVA's JSON or ShareGPT"
    keys = ("conversations", "conversation")


FORMAT = Conversations()
