"""Special tokens that people typed: kept as ordinary text, so that they never become control ids.

A word such as `</s>` in somebody's text gets a mark behind its first character. The tokenizer then does not see the
special token, and the text is split as if the mark were not there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:  # the recipe imports the formats, and should not load these
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

MARK = "\ufdd0"
"""A noncharacter, which Unicode keeps for a program's own use (The Unicode Standard, section 23.7)."""
_KEPT: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Tokenizer]] = WeakKeyDictionary()


def as_typed(text: str, special_tokens: Iterable[str]) -> str:
    """Mark every special token in a text as typed.

    Args:
        text: Somebody's text.
        special_tokens: The tokens that it may hold.

    Returns:
        The text with `MARK` behind the first character of each of them.
    """
    for token in special_tokens:
        if token in text:
            text = text.replace(token, token[0] + MARK + token[1:])
    return text


def without_marks(text: str) -> str:
    """The text as it was typed."""
    return text.replace(MARK, "")


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """List a tokenizer's special tokens, longest first.

    Args:
        tokenizer: A fast tokenizer.

    Returns:
        The texts that it gives a control id wherever they are.
    """
    found = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted((token for token in found if len(token) > 1), key=lambda token: (-len(token), token)))


def text_backend(tokenizer: PreTrainedTokenizerBase, texts: Collection[str]) -> Tokenizer:
    """The tokenizer that splits texts, with marks ignored.

    Args:
        tokenizer: A fast tokenizer.
        texts: What it is to split; without a mark in them the tokenizer's own backend is as good.

    Returns:
        A backend whose offsets count marks as characters of the text.
    """
    backend: Tokenizer = tokenizer.backend_tokenizer
    if not any(MARK in text for text in texts):
        return backend
    kept = _KEPT.get(tokenizer)
    if kept is None or kept[0] != len(tokenizer):
        kept = _KEPT[tokenizer] = (len(tokenizer), _ignoring_marks(backend))
    kept[1].no_truncation()
    kept[1].no_padding()
    return kept[1]


def _ignoring_marks(backend: Tokenizer) -> Tokenizer:
    """A copy of a backend that removes marks once it has looked for special tokens."""
    content = json.loads(backend.to_str())
    remove = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
    normalizers = [remove] if content["normalizer"] is None else [remove, content["normalizer"]]
    content["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    special = set()
    for token in content["added_tokens"]:
        if token["special"]:
            token["normalized"] = False  # looked for before marks are removed
            special.add(token["content"])
    if "merges" in content["model"]:  # no merge may write a special token either
        content["model"]["merges"] = [pair for pair in content["model"]["merges"] if _merged(pair) not in special]
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(content))


def _merged(pair: str | list[str]) -> str:
    return "".join(pair.split(" ") if isinstance(pair, str) else pair)
