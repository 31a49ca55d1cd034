"""Seeded rows with the lengths of ScienceQA's, which all sides of the benchmark train on."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Sequence

import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig
from transformers.trainer_pt_utils import get_length_grouped_indices

from lora_llava.data.conversation import Conversation, Turn
from lora_llava.data.images.image_id import ImageName
from lora_llava.data.images.image_sources import read_rgb

IMAGE_SHARE = 0.49
"""Share of ScienceQA's rows with an image."""
_LOG_MEAN, _LOG_SPREAD, _MOST_WORDS = 5.71, 0.37, 1400
"""Log-normal distribution of a row's text tokens. With 576 tokens for an image, rows have ScienceQA's mean of 615 and
95th percentile of 1,084 under the Llama tokenizer, and padding multiplies the tokens of random batches of 8 by 1.67
(tests/training/test_benchmark.py)."""
_ANSWER_SHARE = 0.65
"""Share of the answer in a row's text, so that 35% of all tokens are trained."""
_IMAGE_SIZE = (480, 360)
"""Pixels, similar to ScienceQA's images."""
_IMAGES = 16
"""Number of different images; each row still decodes its own."""
_MIXED_SIZES = (
    *((750, 429), (750, 429), (302, 232), (760, 506), (202, 202), (452, 595), (556, 208), (704, 358)),
    *((640, 480), (640, 480), (480, 640), (640, 427)),
    *((4032, 3024), (3024, 4032)),
    *((1654, 2339), (1240, 1754)),
)
"""Width and height of the images of a LLaVA-1.6: eight of the most frequent sizes of ScienceQA's test images, four of
COCO's, two photos of a phone and two pages (A4 at 200 and 150 dots per inch). They have 2,033 tokens on average."""
TILES = "tiny_tiles"
SHAPES = {
    "tiny": (512, 1376, 4, 8),
    "tiny_body": (512, 1376, 4, 8),
    TILES: (512, 1376, 4, 8),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}
"""Hidden size, intermediate size, layers and heads of each shape."""
_WORDS = ("red", "blue", "green", "circle", "square", "left", "right", "small", "shape", "which", "the", "and")
"""Words that are one token each in the demo's tokenizer."""


class DrawnImages:
    """Images in memory, named by number: PNG files of one size, or JPEG files of mixed sizes.

    Args:
        mixed: Whether sizes are mixed, for a LLaVA-1.6.
    """

    def __init__(self, mixed: bool = False) -> None:
        self.sides = _MIXED_SIZES if mixed else (_IMAGE_SIZE,) * _IMAGES
        self._files = [_draw_image(seed, sides, "JPEG" if mixed else "PNG") for seed, sides in enumerate(self.sides)]

    def open(self, name: str) -> Image.Image:
        width, height = self.sides[int(name) % _IMAGES]
        return read_rgb(io.BytesIO(self.read(name)), name, width * height)

    def label(self, name: str) -> str:
        return name

    def read(self, name: str) -> bytes:
        return self._files[int(name) % _IMAGES]

    def sizes(self, names: Iterable[str]) -> dict[ImageName, tuple[int, int]]:
        """Return height and width of named images."""
        return {name: self.sides[int(name) % _IMAGES][::-1] for name in names}


def _draw_image(seed: int, sides: tuple[int, int], kind: str) -> bytes:
    coarse = Image.frombytes("RGB", (96, 72), random.Random(seed).randbytes(96 * 72 * 3))
    stream = io.BytesIO()
    coarse.resize(sides).save(stream, kind)
    return stream.getvalue()


def draw_rows(count: int, seed: int = 0, words: int | None = None, questions: int = 1) -> list[Conversation]:
    """Draw conversations of one question and one answer.

    Args:
        count: Number of conversations.
        seed: Seed of the draw.
        words: Text length of every row, each with an image; None draws lengths and images as in ScienceQA.
        questions: Consecutive conversations about one image.
    """
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        length = words or max(16, min(_MOST_WORDS, int(generator.lognormvariate(_LOG_MEAN, _LOG_SPREAD))))
        answer = int(length * _ANSWER_SHARE)
        has_image = words is not None or generator.random() < IMAGE_SHARE
        question = ("<image>\n" if has_image else "") + _text(generator, length - answer)
        turns = (Turn("user", question), Turn("assistant", _text(generator, answer)))
        rows.append(Conversation(str(index), turns, (str(index // questions),) if has_image else (), {}))
    return rows


def row_length(row: Conversation, image_tokens: Sequence[int]) -> int:
    """Return the tokens of a row's text and images, without the few of the template."""
    return sum(len(turn.text.replace("<image>", "").split()) for turn in row.turns) + sum(image_tokens)


def lay_out(
    lengths: Sequence[int], batch_size: int, steps: int, seed: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    """Form batches grouped by length as transformers does, and random batches of the same samples.

    The complete pool is grouped into batches, of which every n-th by length is used, so that a few represent all.

    Args:
        lengths: Tokens of each sample of the pool; at least 200 batches are needed to group as in a real data set.
        batch_size: Samples per batch.
        steps: Number of batches.
        seed: Seed of both.

    Returns:
        The grouped batches and the random ones, each with one more batch in front for warm-up.
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
    """Build the config of a LLaVA-1.5 or 1.6 of some size.

    Args:
        shape: `7b` or `13b` for Vicuna (its config.json) with CLIP ViT-L/14-336; `tiny` for a CPU, with Vicuna's
            vocabulary; `tiny_body` the same with a vocabulary of under 1,000, so that the head has the same share of
            the work as in a 7B model; `tiny_tiles` is `tiny_body` as a LLaVA-1.6, with its five canvases.
        vocabulary: Vocabulary size of `tiny_body` and `tiny_tiles`; the others have 32,064.
        image_token_id: Token id of `<image>`.
    """
    hidden, inner, layers, heads = SHAPES[shape]
    tiny = shape.startswith("tiny")
    text = LlamaConfig(
        vocab_size=vocabulary if shape in ("tiny_body", TILES) else 32064,
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
    llava = LlavaNextConfig if shape == TILES else LlavaConfig
    return llava(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token_id,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
