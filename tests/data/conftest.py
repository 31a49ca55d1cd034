"""Tokenizers whose every piece a test can spell by hand, and those of the demo and of Llama."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from transformers import LlamaTokenizer

from lora_llava.demo.build import build_tokenizer
from lora_llava.model.tokenizer import load_tokenizer

BYTES = [f"<0x{value:02X}>" for value in range(256)]
PIECES = ["<unk>", "<s>", "</s>", *BYTES, "▁", *map(chr, range(33, 127)), "▁▁", "##", "<image>", "<pad>"]
SPECIAL = re.compile(r"</s>|<image>|<pad>|▁▁|##|.", re.DOTALL)


def _with_specials(tokenizer: LlamaTokenizer) -> LlamaTokenizer:
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_bos_token = True
    return tokenizer


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data beside the repository."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: reference data that is not part of the project")
    return folder


@pytest.fixture(scope="session")
def letters() -> LlamaTokenizer:
    """A tokenizer of single letters; only two spaces and two hashes merge, as in Llama's."""
    vocab = {piece: index for index, piece in enumerate(PIECES[:-2])}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=[("▁", "▁"), ("#", "#")])
    return _with_specials(tokenizer)


@pytest.fixture(scope="session")
def demo_tokenizer() -> LlamaTokenizer:
    """The demo's: a trained byte-fallback BPE."""
    return _with_specials(build_tokenizer(0))


@pytest.fixture(scope="session")
def llama_tokenizer(shared: Path) -> LlamaTokenizer:
    """Vicuna's own."""
    return load_tokenizer(shared / "llama_tokenizer")


@pytest.fixture(scope="session")
def spell() -> Callable[..., tuple[list[int], list[int]]]:
    """Ids and labels in `letters`, written from (text, trained) pieces without any tokenizer."""

    def spelled(*pieces: tuple[str, bool], image_tokens: int = 3) -> tuple[list[int], list[int]]:
        ids, labels = [1], [-100]
        for number, (text, trained) in enumerate(pieces):
            prefix = "▁" if number == 0 and not text.startswith("<image>") else ""
            for piece in SPECIAL.findall(prefix + text.replace(" ", "▁")):
                new = [PIECES.index(piece)] if piece in PIECES else [3 + byte for byte in piece.encode()]
                new *= image_tokens if piece == "<image>" else 1
                ids += new
                labels += new if trained else [-100] * len(new)
        return ids, labels

    return spelled


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with red.png, green.png and blue.png, 4 x 4 pixels each."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}.items():
        Image.new("RGB", (4, 4), colour).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def image_folder(images: Path) -> Path:
    """The folder of `images`, for tests that use this name for an image source."""
    return images
