"""Rows as long as ScienceQA's, made from a seed: what both sides of the benchmark train on."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence

import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.trainer_pt_utils import get_length_grouped_indices

from lora_llava.data.conversation import Conversation, Turn
from lora_llava.data.images.reading import read_rgb

IMAGE_SHARE = 0.49
"""ScienceQA's share of rows with an image."""
_LOG_MEAN, _LOG_SPREAD, _MOST_WORDS = 5.71, 0.37, 1400
"""Of a row's text tokens: with 576 for an image, rows have ScienceQA's mean of 615 and 95th percentile of 1,084 under
the Llama tokenizer, and random batches of 8 are 1.67 times padding (tests/training/test_benchmark.py)."""
_ANSWER_SHARE = 0.65
"""Of the text: 35% of all tokens are trained."""
_IMAGE_SIZE = (480, 360)
"""Of the order of ScienceQA's images."""
_IMAGES = 16
"""Different ones; there need be no more to decode one for each row."""
SHAPES = {
    "tiny": (512, 1376, 4, 8),
    "tiny_body": (512, 1376, 4, 8),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}
"""Hidden and inner size, layers and heads."""
_WORDS = ("red", "blue", "green", "circle", "square", "left", "right", "small", "shape", "which", "the", "and")
"""Each one token of the demo's tokenizer."""


class DrawnImages:
    """PNG images in memory, named by number."""

    def __init__(self) -> None:
        self._files = [_draw_image(index) for index in range(_IMAGES)]

    def open(self, name: str) -> Image.Image:
        return read_rgb(io.BytesIO(self.read(name)), name, _IMAGE_SIZE[0] * _IMAGE_SIZE[1])

    def label(self, name: str) -> str:
        return name

    def read(self, name: str) -> bytes:
        return self._files[int(name) % _IMAGES]


def _draw_image(seed: int) -> bytes:
    coarse = Image.frombytes("RGB", (96, 72), random.Random(seed).randbytes(96 * 72 * 3))
    stream = io.BytesIO()
    coarse.resize(_IMAGE_SIZE).save(stream, "PNG")
    return stream.getvalue()


def draw_rows(count: int, seed: int = 0, words: int | None = None) -> list[Conversation]:
    """Conversations of one question and one answer.

    Args:
        count: How many.
        seed: Draws them.
        words: The length of every text, each with an image; None draws lengths and images as ScienceQA has them.
    """
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        length = words or max(16, min(_MOST_WORDS, int(generator.lognormvariate(_LOG_MEAN, _LOG_SPREAD))))
        answer = int(length * _ANSWER_SHARE)
        has_image = words is not None or generator.random() < IMAGE_SHARE
        question = ("<image>\n" if has_image else "") + _text(generator, length - answer)
        turns = (Turn("user", question), Turn("assistant", _text(generator, answer)))
        rows.append(Conversation(str(index), turns, (str(index),) if has_image else (), {}))
    return rows


def text_length(row: Conversation) -> int:
    """Tokens of a row's texts and image, the template's few aside."""
    return sum(len(turn.text.replace("<image>", "").split()) for turn in row.turns) + 576 * len(row.images)


def lay_out(
    lengths: Sequence[int], batch_size: int, steps: int, seed: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    """Batches grouped by length as transformers groups them, and the same samples in random batches.

    Of the batches that the whole pool is grouped into, every n-th by length is taken: few of them stand for all.

    Args:
        lengths: Tokens of each sample of the pool; 200 batches' worth or more is grouped as a real data set is.
        batch_size: Samples of a batch.
        steps: Batches that are taken.
        seed: Draws both.

    Returns:
        The grouped batches and the random ones, each led by one more for warming up.
    """
    order = get_length_grouped_indices(list(lengths), batch_size, generator=torch.Generator().manual_seed(seed))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches.sort(key=lambda batch: sum(lengths[i] for i in batch))
    grouped = [batches[int((step + 0.5) * len(batches) / steps)] for step in range(steps)]
    warm_up = batches[len(batches) // 2]
    generator = random.Random(seed)
    generator.shuffle(grouped)
    samples = [i for batch in grouped for i in batch]
    generator.shuffle(samples)
    shuffled = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    return [warm_up, *grouped], [warm_up, *shuffled]


def _text(generator: random.Random, words: int) -> str:
    return " ".join(generator.choices(_WORDS, k=max(1, words)))


def shape_config(shape: str, vocabulary: int, image_token_id: int) -> LlavaConfig:
    """The config of a LLaVA-1.5 of some size.

    Args:
        shape: `7b` or `13b` for Vicuna's (its config.json) with CLIP ViT-L/14-336; `tiny` for a CPU, with Vicuna's
            vocabulary; `tiny_body` the same with a vocabulary of under 1,000, so that the head's share of the work is
            that of a 7B's.
        vocabulary: Of `tiny_body`; the others have 32,064.
        image_token_id: Of `<image>`.
    """
    hidden, inner, layers, heads = SHAPES[shape]
    tiny = shape.startswith("tiny")
    text = LlamaConfig(
        vocab_size=vocabulary if shape == "tiny_body" else 32064,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )
    width, depth = (64, 3) if tiny else (1024, 24)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64 or 1,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token_id,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
