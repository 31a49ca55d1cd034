"""The tokens of a tokenizer that stand before a text, and those at which an answer stops."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lora_llava.core.errors import UserError

if TYPE_CHECKING:  # the recipe imports the formats, and should not load these
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


class Stop(NamedTuple):
    """Where a generated answer ends: at any of these ids, and at a text if the template's stop is ordinary text."""

    ids: list[int]
    text: str | None = None


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a tokenizer's backend without the truncation and padding that an earlier call may have left in it."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def own_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the tokens that a tokenizer matches as a whole: its special and its added ones."""
    return {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)


def stop_of(tokenizer: PreTrainedTokenizerBase, token: str | None, text: str | None = None) -> Stop:
    """Return where answers end: at EOS, at a template's stop token, and at its stop text.

    Args:
        tokenizer: The model's tokenizer.
        token: The template's stop; ignored if it is not a token.
        text: The template's stop text, if it has one.
    """
    names = [tokenizer.eos_token, *([token.strip()] if token and token.strip() in own_tokens(tokenizer) else [])]
    return Stop([tokenizer.convert_tokens_to_ids(name) for name in dict.fromkeys(names) if name], text)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a tokenizer puts in front of a text: [1] for Llama's, [] for Qwen's and SmolLM2's.

    Args:
        tokenizer: A fast tokenizer.

    Raises:
        UserError: For a tokenizer that puts ids behind a text: an answer could not follow.
    """
    backend = plain_backend(tokenizer)
    bare = list(backend.encode("a", add_special_tokens=False).ids)
    whole = list(backend.encode("a", add_special_tokens=True).ids)
    count = len(whole) - len(bare)
    if whole[count:] != bare:
        added = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(whole)))
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer puts tokens behind a text ({added}), and no answer could follow; "
            "set add_eos_token to false in its tokenizer_config.json"
        )
    return whole[:count]
