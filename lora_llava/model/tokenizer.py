"""Load a tokenizer that splits text exactly like the language model's SentencePiece model.

From a lone `tokenizer.model`, transformers 5 orders merges by id and not by score
(convert_slow_tokenizer.py, `SentencePieceExtractor.extract`), and `LlamaTokenizer` rebuilds its pre-tokenizer at every
load, so that runs of spaces and a leading space are split differently from pre-training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlavaConfig, PreTrainedTokenizerBase, TokenizersBackend

from lora_llava.core.errors import UserError

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
SENTENCEPIECE_FILE = "tokenizer.model"
PROBES = (
    "ASSISTANT:  To be,   or    not.",
    "  two spaces first",
    " one space first",
    "one space last ",
    "   ",
    "",
    "def f(x):\n    if x:\n        return  1\n",
    "a\tb\t\tc\n\n\nd\r\n e",
    "0 12 3456 7,890.5 -1e-5 10:30",
    "中文和日本語の文字、한국어",
    "😀 👩\u200d👧 🏳\ufe0f\u200d🌈",
    "naïve café Ünïcödé ﬁ ½ \u00a0x\u2003y",
    "A. B) (C) <D> [E] {F} #G ##H ###",
    "https://example.org/a?b=c&d=%20",
    "x = {'k': \"v\"};  // y",
    *(f"if x:\n{' ' * n}y" for n in (8, 12, 17, 20, 28, 33, 40)),
    "\t\t\t\t\tx" + "\n" * 9 + "-" * 35 + "=" * 21 + "." * 13,
)
"""Texts that a tokenizer must split like its SentencePiece model."""


def load_tokenizer(folder: Path, config: LlavaConfig | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer that knows `<image>` and `<pad>`, adds one BOS and pads on the right.

    Args:
        folder: A language model's folder or a base folder.
        config: The assembled config, to check that the new tokens get the ids it names.

    Returns:
        A fast tokenizer. If the folder has a `tokenizer.model`, it returns SentencePiece's ids.

    Raises:
        UserError: If the tokenizer's vocabulary is not the model's, or it does not split text like the
            `tokenizer.model` beside it.
    """
    if (folder / SENTENCEPIECE_FILE).is_file():
        tokenizer = _load_by_sentencepiece(folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)  # first, so that ids are llava-hf's: 32000 and 32001
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.add_bos_token = True
    tokenizer.padding_side = "right"
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if config is not None and image_id != config.image_token_index:
        raise UserError(
            f"{folder}: {IMAGE_TOKEN} has id {image_id} in the tokenizer and {config.image_token_index} in the model; "
            "the tokenizer belongs to another model"
        )
    return tokenizer


def copy_sentencepiece(source: Path, target: Path) -> None:
    """Copy a folder's `tokenizer.model`, if it has one; converters to GGUF read it."""
    if (source / SENTENCEPIECE_FILE).is_file():
        shutil.copyfile(source / SENTENCEPIECE_FILE, target / SENTENCEPIECE_FILE)


def _load_by_sentencepiece(folder: Path) -> PreTrainedTokenizerBase:
    """Load a folder's tokenizer, correct its treatment of spaces, and check it against its `tokenizer.model`.

    Merges are those of `tokenizer.json`, as in stock loaders; without that file they are made from `tokenizer.model`.
    """
    file = folder / SENTENCEPIECE_FILE
    try:
        reference = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} cannot be read as a SentencePiece model ({reason}); restore it") from None
    tokenizer = TokenizersBackend.from_pretrained(folder)
    if json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"] == "BPE":
        if not (folder / "tokenizer.json").is_file():
            _set_merges(tokenizer.backend_tokenizer, reference)
        _set_spaces(tokenizer.backend_tokenizer, reference)
    difference = first_difference(tokenizer, reference)
    if difference is not None:
        text, ids, wanted = difference
        raise UserError(
            f"{folder}: the tokenizer splits {text!r} into {ids}, and {SENTENCEPIECE_FILE} into {wanted}; restore the "
            "file of the two that was changed, or remove tokenizer.json, which is then made from the other"
        )
    return tokenizer


def _set_merges(backend: Tokenizer, reference: SentencePieceProcessor) -> None:
    """Set a BPE tokenizer's vocabulary and merges from SentencePiece, and keep its added tokens."""
    pieces = range(reference.get_piece_size())
    backend.model = models.BPE(
        vocab={reference.id_to_piece(i): i for i in pieces},
        merges=merges_by_score(reference),
        unk_token=reference.id_to_piece(reference.unk_id()),
        fuse_unk=True,
        byte_fallback=any(reference.is_byte(i) for i in pieces),
    )


def _set_spaces(backend: Tokenizer, reference: SentencePieceProcessor) -> None:
    """Set SentencePiece's treatment of spaces in a BPE tokenizer, with its dummy prefix if the model has one."""
    backend.normalizer = None
    marked = pre_tokenizers.Metaspace("▁", "never", split=False)
    if not reference.encode("a", out_type=str)[0].startswith("▁"):  # no dummy prefix, such as Gemma's
        backend.pre_tokenizer = marked
        return
    # Metaspace "first" adds no prefix before a text that begins with its own mark, here a space. The first step has
    # written leading spaces as ▁, so that they get the dummy prefix as well.
    prefix = pre_tokenizers.Metaspace(" ", "first", split=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([marked, prefix, marked])


def merges_by_score(reference: SentencePieceProcessor) -> list[tuple[str, str]]:
    """List the merges of SentencePiece's BPE, in their order.

    It merges the two neighbours whose piece has the highest score (sentencepiece, bpe_model.cc). Control, byte and
    unused pieces never result from text.
    """
    scores = {
        reference.id_to_piece(i): reference.get_score(i)
        for i in range(reference.get_piece_size())
        if not (reference.is_control(i) or reference.is_byte(i) or reference.is_unused(i) or reference.is_unknown(i))
    }
    found = [
        (-score, -cut, piece[:cut], piece[cut:])  # longer left half first if scores are equal, as in runs of spaces
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def first_difference(
    tokenizer: PreTrainedTokenizerBase, reference: SentencePieceProcessor
) -> tuple[str, list[int], list[int]] | None:
    """Compare a tokenizer with its SentencePiece model on `PROBES`.

    Returns:
        The first text that they split differently, with the tokenizer's ids and SentencePiece's; None if they agree.
    """
    for text in PROBES:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        wanted = reference.encode(text)
        if ids != wanted:
            return text, ids, wanted
    return None
