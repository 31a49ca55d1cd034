"""Special tokens that occur in ordinary text: kept as text, so that they never become control ids.

A word such as `</s>` in a text gets a mark after its first character. The tokenizer then does not recognise the special
token, and the text is split as if the mark were absent.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lora_llava.data.tokens import plain_backend

if TYPE_CHECKING:  # the recipe imports the formats, and should not load these
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

MARK = "\ufdd0"
"""A noncharacter, reserved by Unicode for internal use (The Unicode Standard, section 23.7)."""
_KEPT: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Tokenizer]] = WeakKeyDictionary()


def as_typed(text: str, special_tokens: Iterable[str]) -> str:
    """Mark every special token in a text as ordinary text.

    Args:
        text: The text.
        special_tokens: The special tokens to mark.

    Returns:
        The text with `MARK` after the first character of each special token.
    """
    for token in special_tokens:
        if token in text:
            text = text.replace(token, token[0] + MARK + token[1:])
    return text


def without_marks(text: str) -> str:
    """Return a text without its marks."""
    return text.replace(MARK, "")


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return a tokenizer's special tokens, longest first.

    Args:
        tokenizer: A fast tokenizer.

    Returns:
        The texts that it encodes as a control id wherever they occur.
    """
    found = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted((token for token in found if len(token) > 1), key=lambda token: (-len(token), token)))


def text_backend(tokenizer: PreTrainedTokenizerBase, texts: Collection[str]) -> Tokenizer:
    """Return a tokenizer backend that ignores marks.

    Args:
        tokenizer: A fast tokenizer.
        texts: The texts to tokenise; if none has a mark, the tokenizer's own backend is returned.

    Returns:
        A backend whose offsets count the marks as characters.
    """
    backend = plain_backend(tokenizer)
    if not any(MARK in text for text in texts):
        return backend
    kept = _KEPT.get(tokenizer)
    if kept is None or kept[0] != len(tokenizer):
        kept = _KEPT[tokenizer] = (len(tokenizer), _ignoring_marks(backend))
    return kept[1]


def _ignoring_marks(backend: Tokenizer) -> Tokenizer:
    """Copy a backend and let it remove marks after it has matched special tokens."""
    content = json.loads(backend.to_str())
    remove = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
    normalizers = [remove] if content["normalizer"] is None else [remove, content["normalizer"]]
    content["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    special = set()
    for token in content["added_tokens"]:
        if token["special"]:
            token["normalized"] = False  # matched before marks are removed
            special.add(token["content"])
    if "merges" in content["model"]:  # no merge may produce a special token either
        content["model"]["merges"] = [pair for pair in content["model"]["merges"] if _merged(pair) not in special]
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(content))


def _merged(pair: str | list[str]) -> str:
    return "".join(pair.split(" ") if isinstance(pair, str) else pair)
