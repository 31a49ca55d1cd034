"""Loading a tokenizer that splits text as the language model's own SentencePiece model does.

transformers 5 makes merges of a lone `tokenizer.model` in the order of ids instead of by score
(convert_slow_tokenizer.py, `SentencePieceExtractor.extract`), and `LlamaTokenizer` rebuilds its pre-tokenizer at every
load, so that runs of spaces and a leading space are split differently from what the model was pre-trained on.
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
"""Texts that a tokenizer must split as its SentencePiece model does."""


def load_tokenizer(folder: Path, config: LlavaConfig | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer that knows `<image>` and `<pad>`, adds one BOS and pads on the right.

    Args:
        folder: A language model's folder or a base folder.
        config: The assembled config, to check that the new tokens get the ids it names.

    Returns:
        A fast tokenizer. Where the folder holds a `tokenizer.model`, it gives SentencePiece's ids.

    Raises:
        UserError: Where the tokenizer's vocabulary is not the model's, or it does not split text as the
            `tokenizer.model` beside it does.
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
            "the tokenizer is another model's"
        )
    return tokenizer


def copy_sentencepiece(source: Path, target: Path) -> None:
    """Copy a folder's `tokenizer.model`, which converters to GGUF read, where it has one."""
    if (source / SENTENCEPIECE_FILE).is_file():
        shutil.copyfile(source / SENTENCEPIECE_FILE, target / SENTENCEPIECE_FILE)


def _load_by_sentencepiece(folder: Path) -> PreTrainedTokenizerBase:
    """Load a folder's tokenizer, its treatment of spaces corrected, and check it against its `tokenizer.model`.

    Merges are made from `tokenizer.model` where there is no `tokenizer.json`; else they are that file's, which stock
    loaders take as well.
    """
    file = folder / SENTENCEPIECE_FILE
    try:
        judge = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} cannot be read as a SentencePiece model ({reason}); restore it") from None
    tokenizer = TokenizersBackend.from_pretrained(folder)
    if json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"] == "BPE":
        if not (folder / "tokenizer.json").is_file():
            _set_merges(tokenizer.backend_tokenizer, judge)
        _set_spaces(tokenizer.backend_tokenizer, judge)
    difference = first_difference(tokenizer, judge)
    if difference is not None:
        text, ids, wanted = difference
        raise UserError(
            f"{folder}: the tokenizer splits {text!r} into {ids}, and {SENTENCEPIECE_FILE} into {wanted}; restore the "
            "file of the two that was changed, or remove tokenizer.json, which is then made from the other"
        )
    return tokenizer


def _set_merges(backend: Tokenizer, judge: SentencePieceProcessor) -> None:
    """Give a BPE tokenizer SentencePiece's vocabulary and merges; its added tokens stay."""
    pieces = range(judge.get_piece_size())
    backend.model = models.BPE(
        vocab={judge.id_to_piece(i): i for i in pieces},
        merges=merges_by_score(judge),
        unk_token=judge.id_to_piece(judge.unk_id()),
        fuse_unk=True,
        byte_fallback=any(judge.is_byte(i) for i in pieces),
    )


def _set_spaces(backend: Tokenizer, judge: SentencePieceProcessor) -> None:
    """Give a BPE tokenizer SentencePiece's treatment of spaces, its dummy prefix included where the model has one."""
    backend.normalizer = None
    marked = pre_tokenizers.Metaspace("▁", "never", split=False)
    if not judge.encode("a", out_type=str)[0].startswith("▁"):  # no dummy prefix, such as Gemma's
        backend.pre_tokenizer = marked
        return
    # "first" adds nothing before a text that begins with its own mark. Written as ▁ before, a leading space is not
    # that mark, so that the dummy prefix comes before it as well.
    prefix = pre_tokenizers.Metaspace(" ", "first", split=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([marked, prefix, marked])


def merges_by_score(judge: SentencePieceProcessor) -> list[tuple[str, str]]:
    """List the merges that SentencePiece's BPE makes, the first the one it makes first.

    It joins the two neighbours that make the piece of the highest score (sentencepiece, bpe_model.cc). Control, byte
    and unused pieces are never made of text.
    """
    scores = {
        judge.id_to_piece(i): judge.get_score(i)
        for i in range(judge.get_piece_size())
        if not (judge.is_control(i) or judge.is_byte(i) or judge.is_unused(i) or judge.is_unknown(i))
    }
    found = [
        (-score, -cut, piece[:cut], piece[cut:])  # of equal scores the longer left half: runs of spaces need it
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def first_difference(
    tokenizer: PreTrainedTokenizerBase, judge: SentencePieceProcessor
) -> tuple[str, list[int], list[int]] | None:
    """Compare a tokenizer with its SentencePiece model on `PROBES`.

    Returns:
        The first text that they split differently, with the tokenizer's ids and SentencePiece's; None where there is
        none.
    """
    for text in PROBES:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        wanted = judge.encode(text)
        if ids != wanted:
            return text, ids, wanted
    return None
