"""Sample prompts to verify a merge with: questions from the run's data if available, and built-in ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import Conversation
from lora_llava.data.images.image_sources import BadImageError, SplitImages
from lora_llava.recipe import EvaluationSection, Recipe
from lora_llava.splits.split_rows import sample_rows

PER_KIND = 4
_READ = 2_000
"""Number of rows drawn from the data, from which prompts are chosen."""
ASKED_OF_IMAGES = ("What is shown?", "Describe the image.", "How many shapes are there?", "Which colours do you see?")
ASKED_WITHOUT = (
    "What is the capital of France?",
    "Count from one to five.",
    "Is ice colder than steam?",
    "Name a fruit.",
)


@dataclass(frozen=True)
class ProofPrompt:
    """A prompt.

    Attributes:
        text: The user's text.
        image: The image, or None.
    """

    text: str
    image: Image.Image | None

    def message(self) -> dict[str, Any]:
        """Return the prompt as a chat message for a stock processor."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": self.text}]
        if self.image is not None:
            parts.insert(0, {"type": "image", "image": self.image})
        return {"role": "user", "content": parts}


def sample_prompts(recipe: Recipe | None, count: int = PER_KIND) -> tuple[list[ProofPrompt], str]:
    """Draw prompts with and without an image.

    Args:
        recipe: The recipe whose data to use; None for built-in prompts only.
        count: Number of prompts of each kind; built-in prompts make up for missing rows.

    Returns:
        Prompts, those with an image first, and a phrase on their origin.
    """
    rows, images, source = _rows(recipe)
    stock = [row for row in rows if "<image>" not in _text(row)]  # a stock processor treats it as an image
    with_image = [row for row in stock if len(row.images) == 1]
    without = [row for row in stock if not row.images]
    generator = random.Random(0)
    chosen = generator.sample(with_image, min(count, len(with_image)))
    text_only = generator.sample(without, min(count, len(without)))
    samples = [sample for row in chosen if images is not None and (sample := _opened(row, images))]
    from_data = len(samples) + len(text_only)
    samples += [
        ProofPrompt(text, draw_image(i)) for i, text in enumerate(_cycle(ASKED_OF_IMAGES, count - len(samples)))
    ]
    samples += [ProofPrompt(_text(row), None) for row in text_only]
    samples += [ProofPrompt(text, None) for text in _cycle(ASKED_WITHOUT, count - len(text_only))]
    return samples, f"{from_data} from {source}, {2 * count - from_data} built-in"


def _cycle(texts: Sequence[str], count: int) -> list[str]:
    return [texts[i % len(texts)] for i in range(count)]


def _opened(row: Conversation, images: SplitImages) -> ProofPrompt | None:
    """Return a row's prompt; None if its image cannot be opened, so that a built-in one replaces it."""
    try:
        return ProofPrompt(_text(row), images.open(row.images[0]))
    except BadImageError:
        return None


def _rows(recipe: Recipe | None) -> tuple[Sequence[Conversation], SplitImages | None, str]:
    if recipe is None:
        return [], None, "the run's data (it has no recipe)"
    try:
        split = "test" if recipe.data.format == "scienceqa" and recipe.data.splits.test is not None else "train"
        evaluated = recipe.model_copy(update={"evaluation": EvaluationSection()})
        rows, images, _ = sample_rows(evaluated, split, _READ)
        return rows, images, "the run's test split" if split == "test" else "the run's training rows"
    except (UserError, OSError):
        return [], None, "the run's data (not available)"


def _text(row: Conversation) -> str:
    turn = next(turn for turn in row.turns if turn.role == "user")
    return turn.words


def draw_image(seed: int, size: int = 96) -> Image.Image:
    """Draw three coloured shapes, for prompts without data."""
    generator = random.Random(seed)
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    for shape in (draw.rectangle, draw.ellipse, draw.rectangle):
        x, y = generator.randrange(size // 2), generator.randrange(size // 2)
        shape((x, y, x + size // 3, y + size // 3), fill=tuple(generator.randrange(256) for _ in range(3)))
    return image
