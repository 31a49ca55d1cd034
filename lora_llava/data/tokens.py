"""The ids that a tokenizer itself puts in front of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_llava.core.errors import UserError

if TYPE_CHECKING:  # the recipe imports the formats, and should not load these
    from transformers import PreTrainedTokenizerBase


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a tokenizer puts in front of a text: [1] for Llama's, [] for Qwen's and SmolLM2's.

    Args:
        tokenizer: A fast tokenizer.

    Raises:
        UserError: For a tokenizer that puts ids behind a text: an answer could not follow.
    """
    backend = tokenizer.backend_tokenizer
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
