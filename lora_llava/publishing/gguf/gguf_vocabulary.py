"""A tokenizer as llama.cpp's vocabulary: tokens, scores or merges, special ids, and what is put in front of a text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from lora_llava.core.errors import UserError
from lora_llava.core.json_files import read_object, read_object_if_any
from lora_llava.publishing.gguf.byte_level import byte_level_name
from lora_llava.publishing.gguf.gguf_source import GgufSource

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp, include/llama.h, `llama_token_type`."""
_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0


@dataclass(frozen=True)
class GgufVocabulary:
    """llama.cpp's view of a tokenizer.

    Attributes:
        kind: llama.cpp's name: `llama` (SentencePiece by scores), `gemma4` (the same form with a list of merges) or
            `gpt2` (byte-level BPE).
        pre: Name of the pre-tokenizer.
        tokens: Text of every id.
        types: Type of every id.
        scores: Score of every id; None except for `llama`.
        merges: The merges as `left right`; None for `llama`.
        add_bos: Whether BOS is put in front of a text.
        add_space_prefix: Whether a space is put in front of a text and after every special token.
        leading_space: Whether a space is put in front of a text only; the chat template has to write it.
        ids: Ids of bos, eos, eot, unk and pad, as far as they exist.
        stops: Texts that end an answer and are not tokens.
    """

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    add_bos: bool
    add_space_prefix: bool
    leading_space: bool
    ids: dict[str, int]
    stops: list[str] = field(default_factory=list)


def read_gguf_vocabulary(source: GgufSource) -> GgufVocabulary:
    """Read a model's tokenizer.

    Raises:
        UserError: If llama.cpp has no such tokenizer.
    """
    file = source.folder / "tokenizer.json"
    content, size = read_object(file), source.config.text_config.vocab_size
    model = content["model"]
    if model.get("type") != "BPE":
        raise UserError(f"{file}: the tokenizer is a {model.get('type')} model; the GGUF writer knows BPE")
    tokenizer = Tokenizer.from_file(str(file))
    settings = read_object_if_any(source.folder / "tokenizer_config.json")
    ids, stops = _special_ids(source, settings, tokenizer)
    add_bos = _adds_bos(tokenizer, ids.get("bos"), file)
    tokens, types = _tokens(content, size, file)
    if not model.get("byte_fallback"):
        merges = [_pair(merge) for merge in model["merges"]]
        joined = [f"{left} {right}" for left, right in merges]
        return GgufVocabulary(
            "gpt2", byte_level_name(content, file), tokens, types, None, joined, add_bos, False, False, ids, stops
        )
    return _sentencepiece(source, content, (tokens, types), tokenizer, (add_bos, ids, stops))


def _sentencepiece(
    source: GgufSource,
    content: dict[str, Any],
    entries: tuple[list[str], list[int]],
    tokenizer: Tokenizer,
    rest: tuple[bool, dict[str, int], list[str]],
) -> GgufVocabulary:
    """Return the vocabulary of a BPE with byte fallback, which SentencePiece makes."""
    (tokens, types), (add_bos, ids, stops) = entries, rest
    first, after_special = _spaces(tokenizer, content)
    merges = [_pair(merge) for merge in content["model"]["merges"]]
    scores: list[float] | None
    if source.sentencepiece is not None:
        scores = _scores_of_file(source.sentencepiece, tokens)
    else:
        scores = _scores_of_merges(merges, content["model"]["vocab"], tokens)
    if scores is not None:
        spaces = (after_special, first and not after_special)
        return GgufVocabulary("llama", "default", tokens, types, scores, None, add_bos, *spaces, ids, stops)
    if after_special or not add_bos:
        raise UserError(
            f"{source.folder}/tokenizer.json: its merges are not those of a SentencePiece model, and llama.cpp would "
            "split words otherwise; put the tokenizer.model that it was made from beside it"
        )
    joined = [f"{left} {right}" for left, right in merges]
    return GgufVocabulary("gemma4", "gemma4", tokens, types, None, joined, add_bos, False, first, ids, stops)


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _tokens(content: dict[str, Any], size: int, file: Path) -> tuple[list[str], list[int]]:
    """Return text and type of every id; rows of the embedding without a token get names that no text has."""
    vocabulary = {id_: token for token, id_ in content["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in content.get("added_tokens", [])}
    last = max([*vocabulary, *added])
    if last >= size:
        raise UserError(
            f"{file} has a token with id {last}, but the model has {size} rows; it belongs to another model"
        )
    fallback = content["model"].get("byte_fallback")
    tokens, types = [], []
    for id_ in range(size):
        token = added[id_]["content"] if id_ in added else vocabulary.get(id_, f"[PAD{id_}]")
        tokens.append(token)
        if id_ in added:
            types.append(CONTROL if added[id_]["special"] else USER_DEFINED)
        elif id_ not in vocabulary:
            types.append(UNUSED)
        else:
            types.append(BYTE if fallback and _is_byte(token) else NORMAL)
        if fallback and token == "<unk>":
            types[-1] = UNKNOWN
    return tokens, types


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores_of_file(file: Path, tokens: list[str]) -> list[float]:
    """Return the scores in a `tokenizer.model`; tokens that were added to it get a low one."""
    pieces = SentencePieceProcessor(model_file=str(file))
    scores = [_ADDED_SCORE if not token.startswith("[PAD") else _UNUSED_SCORE for token in tokens]
    for id_ in range(pieces.get_piece_size()):
        if id_ >= len(tokens) or pieces.id_to_piece(id_) != tokens[id_]:
            raise UserError(
                f"{file} has {pieces.id_to_piece(id_)!r} as token {id_}, the model has "
                f"{tokens[id_] if id_ < len(tokens) else 'no row'!r}; it belongs to another model"
            )
        scores[id_] = pieces.get_score(id_)
    return scores


def _scores_of_merges(
    merges: list[tuple[str, str]], vocabulary: dict[str, int], tokens: list[str]
) -> list[float] | None:
    """Return scores with which llama.cpp merges like a list of merges; None if no scores do.

    llama.cpp joins any two neighbours whose text is a token, the best score first. That equals the list of merges if it
    has every split of a token into two tokens, and all splits of a token follow each other.
    """
    order: dict[str, int] = {}
    previous = None
    for left, right in merges:
        token = left + right
        if token in order and token != previous:
            return None
        order.setdefault(token, len(order))
        previous = token
    known = set(merges)
    for token in vocabulary:
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        if any(a in vocabulary and b in vocabulary and (a, b) not in known for a, b in splits) and not _is_byte(token):
            return None
    return [-float(order[token]) if token in order else _ADDED_SCORE * 1000 for token in tokens]


def _spaces(tokenizer: Tokenizer, content: dict[str, Any]) -> tuple[bool, bool]:
    """Return whether a space is put in front of a text, and in front of the text after a special token."""
    special = next((entry["content"] for entry in content.get("added_tokens", []) if entry["special"]), None)
    first = tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE)
    if special is None:
        return first, first
    after = tokenizer.encode(f"a{special}a", add_special_tokens=False).tokens
    return first, after[after.index(special) + 1].startswith(SPACE)


def _adds_bos(tokenizer: Tokenizer, bos: int | None, file: Path) -> bool:
    bare, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    if whole == bare:
        return False
    if bos is not None and whole == [bos, *bare]:
        return True
    raise UserError(f"{file}: the tokenizer puts {whole} around {bare}; llama.cpp can put BOS in front, nothing else")


def _special_ids(
    source: GgufSource, settings: dict[str, Any], tokenizer: Tokenizer
) -> tuple[dict[str, int], list[str]]:
    """Return the special ids by llama.cpp's names, and the texts at which answers stop."""
    ids = {}
    for name in ("bos", "unk", "pad"):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and (id_ := tokenizer.token_to_id(token)) is not None:
            ids[name] = id_
    generation = read_object_if_any(source.folder / "generation_config.json")
    ends = generation.get("eos_token_id", source.config.text_config.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    if not ends or ends[0] is None:
        raise UserError(f"{source.folder}/generation_config.json: no eos_token_id; name the token that ends an answer")
    ids |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
    stops = generation.get("stop_strings") or []
    return ids, [stops] if isinstance(stops, str) else list(stops)


def add_vocabulary(writer: Any, vocabulary: GgufVocabulary, template: str | None) -> None:
    """Write a vocabulary's metadata.

    Args:
        writer: A `gguf.GGUFWriter`.
        vocabulary: The vocabulary.
        template: The chat template; None to write none.
    """
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    for name, id_ in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(id_)
    if template is not None:
        writer.add_chat_template(template)
