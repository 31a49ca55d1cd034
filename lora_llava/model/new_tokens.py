"""Tokens that a recipe adds to the vocabulary; PEFT trains their rows of embeddings and head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken
from transformers import LlavaConfig, PreTrainedTokenizerBase

from lora_llava.core.errors import UserError
from lora_llava.model.tokenizer import load_tokenizer


def add_new_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], config: LlavaConfig, *, known: bool = False
) -> list[int]:
    """Add tokens to a tokenizer, in their order, behind all others.

    They are ordinary tokens and not special ones, so that a text that contains one is encoded to its id: special
    tokens in people's texts are kept as text.

    Args:
        tokenizer: From `load_tokenizer`; changed in place.
        tokens: The tokens.
        config: Configuration of the LLaVA, whose embeddings must have a row for each.
        known: Whether the tokenizer may know them already, as that of a trained model does.

    Returns:
        Their ids.

    Raises:
        UserError: If the tokenizer knows one of them already, or the embeddings have no row for one.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token in vocabulary and not known:
            raise UserError(
                f"model.new_tokens: {token!r} is in the tokenizer already, with id {vocabulary[token]}; leave it out, "
                "or name another"
            )
    added = [AddedToken(token, normalized=False, special=False) for token in tokens if token not in vocabulary]
    tokenizer.add_tokens(added)
    ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]
    rows = config.text_config.vocab_size
    if too_high := [index for index in ids if index >= rows]:
        spare = len(ids) - len(too_high)
        raise UserError(
            f"model.new_tokens names {len(ids)} tokens, and the model's embeddings have {spare} spare rows; name at "
            f"most {spare}, or start from model.llm and model.vision_tower, whose base gets more rows"
        )
    return ids


def new_token_ids(folder: Path, tokens: Sequence[str], config: LlavaConfig) -> list[int]:
    """Return the ids that tokens get in the tokenizer of a base folder."""
    return add_new_tokens(load_tokenizer(folder, config), tokens, config, known=True) if tokens else []
