"""Load a tokenizer that splits text exactly like the language model's SentencePiece model.

From a lone `tokenizer.model`, transformers 5 orders merges by id and not by score
(convert_slow_tokenizer.py, `SentencePieceExtractor.extract`), and `LlamaTokenizer` rebuilds its pre-tokenizer at every
load, so that runs of spaces and a leading space are split differently from pre-training.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlavaConfig, PreTrainedTokenizerBase, TokenizersBackend

from lora_llava.core.errors import UserError
from lora_llava.core.json_files import read_object_if_any
from lora_llava.data.tokens import leading_ids
from lora_llava.data.typed import special_tokens

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
SENTENCEPIECE_FILE = "tokenizer.model"
VOCABULARY_MULTIPLE = 64
"""llava-hf pads Vicuna's 32,002 tokens to 32,064, the next multiple."""
_TOKEN_RULE = "2"
"""Raise it when the same tokenizer would get other ids."""
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


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a LLaVA that its language model does not name.

    Attributes:
        image_id: Id of `<image>`.
        pad_id: Id of the pad token.
        size: Rows of the embedding: those of the language model, or the next multiple of 64 that holds every id.
        token_rule: None where the two tokens are the first new rows and a BOS stands in front of every text, as in
            every base of earlier versions; else the version of the rule that chose them.
    """

    image_id: int
    pad_id: int
    size: int
    token_rule: str | None = None


def appended_to(rows: int) -> Vocabulary:
    """Return the ids where `<image>` and `<pad>` are appended to a vocabulary, as llava-hf did with Vicuna's."""
    return Vocabulary(rows, rows + 1, _rounded(rows + 2))


def _rounded(rows: int) -> int:
    return -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def read_vocabulary(folder: Path, llm: Mapping[str, Any], new_tokens: int = 0) -> Vocabulary:
    """Return the ids of a LLaVA made of a language model: in spare rows of its embedding, or in new ones.

    Args:
        folder: The language model's folder, with its tokenizer.
        llm: Its config.json.
        new_tokens: Tokens of a recipe, which get the ids behind all others.

    Raises:
        UserError: If the tokenizer is another model's, or cannot be used.
    """
    rows = llm.get("vocab_size")
    if not isinstance(rows, int) or rows < 1:
        raise UserError(f"{folder}/config.json: vocab_size is {rows!r}; it should be the rows of the embedding")
    state = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*token*")))
    return _read_vocabulary(folder, rows, new_tokens, state)


@functools.lru_cache(16)
def _read_vocabulary(folder: Path, rows: int, new_tokens: int, _: Any) -> Vocabulary:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.get_vocab()
    new = {IMAGE_TOKEN, tokenizer.pad_token, *special_tokens(tokenizer)}
    clashes = sorted((id_, token) for token, id_ in ids.items() if id_ >= rows and token not in new)
    if clashes:
        raise UserError(
            f"{folder}: the tokenizer has {len(clashes):,} tokens that the model has no row for, such as "
            f"{clashes[0][1]!r} with id {clashes[0][0]:,} of {rows:,} rows; the tokenizer belongs to another model"
        )
    image_id, pad_id = ids[IMAGE_TOKEN], ids[str(tokenizer.pad_token)]
    needed = max(ids.values()) + 1 + new_tokens
    size = rows if needed <= rows else _rounded(needed)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    classic = (image_id, pad_id) == (rows, rows + 1) and leading_ids(tokenizer) == bos
    return Vocabulary(image_id, pad_id, size, None if classic else _TOKEN_RULE)


def load_tokenizer(folder: Path, config: LlavaConfig | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer that knows `<image>` and a pad token, pads on the right, and adds BOS if its files say so.

    Args:
        folder: A language model's folder or a base folder.
        config: The assembled config, to check that `<image>` has the id it names.

    Returns:
        A fast tokenizer. If the folder has a `tokenizer.model`, it returns SentencePiece's ids.

    Raises:
        UserError: If the tokenizer's vocabulary is not the model's, it does not split text like the `tokenizer.model`
            beside it, or it puts tokens behind a text.
    """
    if (folder / SENTENCEPIECE_FILE).is_file():
        tokenizer = _load_by_sentencepiece(folder)
    else:
        tokenizer = _load_stock(_loader_of(folder), folder)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)  # first, so that ids are llava-hf's: 32000 and 32001
    if not _has_own_pad(tokenizer):
        full = config is not None and len(tokenizer) >= config.text_config.vocab_size  # a complete LLaVA's
        pad = (tokenizer.pad_token or tokenizer.eos_token) if full else PAD_TOKEN
        tokenizer.add_special_tokens({"pad_token": pad})
    if leading_ids(tokenizer) == [tokenizer.bos_token_id]:
        tokenizer.add_bos_token = True  # says what it does; some files only have it in their post-processor
    tokenizer.padding_side = "right"
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if config is not None and image_id != config.image_token_index:
        raise UserError(
            f"{folder}: {IMAGE_TOKEN} has id {image_id} in the tokenizer and {config.image_token_index} in the model; "
            "the tokenizer belongs to another model"
        )
    return tokenizer


def _has_own_pad(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Check whether a tokenizer has a pad token that means nothing else."""
    others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    return tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in others


def _settings(folder: Path, name: str = "tokenizer_config.json") -> dict[str, Any]:
    return read_object_if_any(folder / name)


def _loader_of(folder: Path) -> Any:
    """Return the class that loads a tokenizer without `tokenizer.model`: its tokenizer.json as it is.

    For some types of models, AutoTokenizer would build another tokenizer from the vocabulary and merges alone
    (transformers/models/auto/tokenization_auto.py, MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS).
    """
    is_llama = str(_settings(folder).get("tokenizer_class", "")).startswith("Llama")
    is_llama = is_llama and _settings(folder, "config.json").get("model_type", "llama") == "llama"
    return TokenizersBackend if (folder / "tokenizer.json").is_file() and not is_llama else AutoTokenizer


def _load_stock(loader: Any, folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare exceptions for damaged files
        reason = (str(error).strip().splitlines() or ["damaged"])[0]
        raise UserError(f"{folder}: its tokenizer cannot be loaded ({reason}); restore its files") from None
    names = tokenizer.vocab_files_names.values()
    if not any((folder / name).is_file() for name in names):  # transformers then builds one without words
        raise UserError(f"{folder} has no tokenizer ({' or '.join(names)}); add its files")
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: its tokenizer has no tokenizer.json; name a model that has one")
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
    tokenizer = _load_stock(TokenizersBackend, folder)
    if not (folder / "tokenizer.json").is_file():
        tokenizer.add_bos_token = _adds_bos(folder)
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


def _adds_bos(folder: Path) -> bool:
    """Return whether a tokenizer without tokenizer.json adds BOS; Llama's does unless its settings say otherwise."""
    return bool(_settings(folder).get("add_bos_token", True))


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
