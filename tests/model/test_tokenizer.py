"""Tokenizers from small SentencePiece models have its ids, before and after a reload."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2
from transformers import AutoTokenizer, LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.data.templates.named_templates import get_template
from lora_llava.data.templates.spans import fit_template
from lora_llava.model.base import BaseParts, build_base
from lora_llava.model.tokenizer import PROBES, load_tokenizer
from lora_llava.model.weights.parts import Part, folder_hash

WORDS = ["ASSISTANT:", "USER:", "the", "there", "then", "to", "def f(x):", "return", "    ", "  ", "0123456789", "\n"]
TEXTS = st.lists(
    st.sampled_from([*WORDS, " ", "   ", " " * 17, "\t", "中", "é", "😀", "a", "▁", "x = 1", ".", "\u00a0", "#"]),
    max_size=12,
).map("".join)


def train(folder: Path, **options: object) -> Path:
    """Make a folder with only a `tokenizer.model`, like Vicuna's: BPE with byte fallback, not normalised."""
    folder.mkdir(parents=True)
    corpus = folder.parent / f"{folder.name}.txt"
    lines = [" ".join(WORDS[i % 5 :] + WORDS[: i % 7]).replace("\n", " ") for i in range(300)]
    corpus.write_text("\n".join(lines), encoding="utf-8")
    settings = {
        "model_type": "bpe",
        "vocab_size": 350,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_by_whitespace": True,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "minloglevel": 2,
        "pad_id": -1,
    }
    SentencePieceTrainer.train(input=str(corpus), model_prefix=str(folder / "tokenizer"), **settings | options)
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("sentencepiece") / "llm")


@pytest.fixture(scope="module")
def judge(folder: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def reloaded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    """Load a saved tokenizer with stock transformers."""
    saved = tmp_path_factory.mktemp("saved")
    load_tokenizer(folder).save_pretrained(saved)
    return AutoTokenizer.from_pretrained(saved)


@given(text=TEXTS | st.text(max_size=20).filter(lambda text: "\ufdd0" not in text and "<" not in text))
def test_ids_are_sentencepiece_s_after_a_reload(reloaded, judge: SentencePieceProcessor, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    if "\0" in text:  # ends a text in SentencePiece's C++
        return
    assert reloaded.encode(text, add_special_tokens=False) == judge.encode(text)


def test_probes_split_as_sentencepiece_splits_them(reloaded, judge: SentencePieceProcessor) -> None:
    assert [reloaded.encode(text, add_special_tokens=False) for text in PROBES] == [judge.encode(x) for x in PROBES]


def test_runs_of_spaces_of_equal_score_split_as_sentencepiece_splits_them(folder: Path, tmp_path: Path) -> None:
    # Llama's own model has them so: 1 to 16 spaces, all of score -1e9, in this order of ids.
    shutil.copytree(folder, tmp_path / "llm")
    file = tmp_path / "llm" / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    lengths = (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 15, 1)
    for piece in list(model.pieces):
        if set(piece.piece) == {"▁"}:
            model.pieces.remove(piece)
    for length in lengths:
        model.pieces.add(piece="▁" * length, score=-1e9)
    file.write_bytes(model.SerializeToString())
    judge = SentencePieceProcessor(model_file=str(file))
    tokenizer = load_tokenizer(tmp_path / "llm")
    runs = [before + " " * n + after for n in range(1, 80) for before in ("", "a", "\n") for after in ("", "to")]
    assert [tokenizer.encode(text, add_special_tokens=False) for text in runs] == [judge.encode(x) for x in runs]


def test_a_role_after_a_stop_gains_no_space(reloaded) -> None:
    tokens = reloaded.tokenize("the</s>USER: <image> \nto")
    assert tokens[tokens.index("</s>") + 1][0] == "U"
    assert tokens[tokens.index("<image>") + 1 :][:2] == ["▁", "<0x0A>"]
    assert reloaded("the").input_ids[0] == reloaded.bos_token_id


def test_no_dummy_prefix_means_no_space_after_an_image(tmp_path: Path) -> None:
    bare = train(tmp_path / "bare", add_dummy_prefix=False)
    tokenizer = load_tokenizer(bare)
    judge = SentencePieceProcessor(model_file=str(bare / "tokenizer.model"))
    assert [tokenizer.encode(text, add_special_tokens=False) for text in PROBES] == [judge.encode(x) for x in PROBES]
    assert fit_template(get_template("vicuna_v1"), tokenizer).after_image == ""


def test_a_tokenizer_json_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = train(tmp_path / "other", vocab_size=330)
    load_tokenizer(folder).save_pretrained(tmp_path / "mixed")
    shutil.copy(other / "tokenizer.model", tmp_path / "mixed")
    with pytest.raises(UserError, match=r"mixed: the tokenizer splits .* or remove tokenizer\.json"):
        load_tokenizer(tmp_path / "mixed")


def test_a_tokenizer_json_with_other_merges_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "llm")
    load_tokenizer(folder).save_pretrained(tmp_path / "llm")
    load_tokenizer(tmp_path / "llm")
    content = json.loads((tmp_path / "llm" / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (tmp_path / "llm" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"llm: the tokenizer splits 'ASSISTANT:  To be,   or    not\.' into \["):
        load_tokenizer(tmp_path / "llm")


def test_a_damaged_sentencepiece_model_is_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "llm")
    (tmp_path / "llm" / "tokenizer.model").write_bytes(b"\x0a\xff\xff")
    with pytest.raises(UserError, match=r"tokenizer\.model cannot be read as a SentencePiece model .*; restore it"):
        load_tokenizer(tmp_path / "llm")


def test_the_base_keeps_tokenizer_and_sentencepiece_model(
    folder: Path, parts: Path, tmp_path: Path, judge: SentencePieceProcessor
) -> None:
    shutil.copytree(parts / "llm", tmp_path / "llm")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "llm" / name).unlink(missing_ok=True)
    shutil.copy(folder / "tokenizer.model", tmp_path / "llm")
    shutil.copy(folder / "tokenizer_config.json", tmp_path / "llm")
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "llm" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:350].clone()
    save_file(weights, tmp_path / "llm" / "model.safetensors", {"format": "pt"})
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config | {"vocab_size": 350}))
    llm = Part("llm", tmp_path / "llm", folder_hash(tmp_path / "llm"))
    tower = Part("tower", parts / "vision_tower", folder_hash(parts / "vision_tower"))
    made = BaseParts("llm", llm.revision, "tower", tower.revision, "mlp2x_gelu", None, 0)
    base = build_base(made, llm, tower, None)
    assert (base / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    again = load_tokenizer(base, LlavaConfig.from_pretrained(base))
    assert again.convert_tokens_to_ids("<image>") == 350
    for stock in (again, AutoTokenizer.from_pretrained(base)):
        assert [stock.encode(x, add_special_tokens=False) for x in PROBES] == [judge.encode(x) for x in PROBES]
