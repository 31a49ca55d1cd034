"""Answers of a model whose own processor writes the prompts: for questions that no recipe describes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.core.storage import file_hash
from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation
from lora_llava.data.encode import IGNORE_INDEX
from lora_llava.data.images.image_id import ImageName
from lora_llava.data.images.image_sources import BadImageError, Pixels, SplitImages
from lora_llava.data.typed import without_marks
from lora_llava.evaluation.answerers import Answerer
from lora_llava.inference.answer import Answer
from lora_llava.inference.generate import generate_answers
from lora_llava.inference.likelihood import answer_losses
from lora_llava.inference.prompt import prompt_ids as written_ids
from lora_llava.inference.question import Question
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.speak import Speaker
from lora_llava.model.adapter_file import checked_base
from lora_llava.model.families.tower_families import image_tokens, tiling_of, tokens_of_image
from lora_llava.model.provenance import weights_state
from lora_llava.model.vision import llava_of
from lora_llava.model.weights.names import ADAPTER_FILE
from lora_llava.runs.directory import is_run, read_record


def by_speaker(speaker: Speaker, images: SplitImages, batch_size: int, sampling: Sampling) -> Answerer:
    """Return an answerer for a model whose own processor writes the prompts.

    Args:
        speaker: The model.
        images: Opens the images of the rows.
        batch_size: Most questions in one batch.
        sampling: How tokens are sampled.
    """

    def answer(rows: Sequence[Conversation], answered: Collection[int]) -> Iterator[tuple[int, Answer]]:
        return generate_answers(
            speaker.model,
            [Question(prompt_ids(speaker, row, images), row.images) for row in rows],
            tokenizer=speaker.processor.tokenizer,
            load_pixels=Pixels(images, speaker.processor.image_processor),
            batch_size=batch_size,
            sampling=sampling,
            stop=speaker.stop,
            answered=answered,
        )

    return answer


def given_losses(
    speaker: Speaker, rows: Sequence[Conversation], images: SplitImages, batch_size: int
) -> Iterator[tuple[int, float, bool]]:
    """Compute the loss of the last answer of each row, its stop included.

    Args:
        speaker: The model.
        rows: Conversations that end with the answer.
        images: Opens their images.
        batch_size: Most rows in one batch.

    Yields:
        The row's index, the mean loss of its answer's tokens in nats, and whether the answer is the greedy one.
    """
    found = answer_losses(
        speaker.model,
        [_with_answer(speaker, row, images) for row in rows],
        [row.images for row in rows],
        load_pixels=Pixels(images, speaker.processor.image_processor),
        batch_size=batch_size,
        pad_token_id=speaker.processor.tokenizer.pad_token_id,
    )
    yield from ((index, nats / tokens, greedy) for index, nats, tokens, greedy in found)


def prompt_ids(speaker: Speaker, row: Conversation, images: SplitImages) -> list[int]:
    """Encode a row up to its last answer with the speaker's processor.

    Args:
        speaker: The model.
        row: The row.
        images: Opens its images, whose sizes decide how many tokens a LLaVA-1.6 gives them.

    Raises:
        UserError: For a model of captions, or a prompt that leaves no position for an answer.
    """
    if speaker.single_turn:
        raise UserError(f"{speaker.name} was trained on captions (template plain), not on questions; name another")
    ids = written_ids(speaker.processor, written_messages(row)[:-1], _image_tokens(speaker, row, images))
    positions = int(llava_of(speaker.model).config.text_config.max_position_embeddings)
    if len(ids) >= positions:
        shown = f" with {len(row.images):,} image{'s' * (len(row.images) > 1)}" if row.images else ""
        raise UserError(
            f"{row.name}{shown} has {len(ids):,} tokens, and {speaker.name} only {positions:,} positions; leave it out"
        )
    return ids


def _with_answer(speaker: Speaker, row: Conversation, images: SplitImages) -> tuple[list[int], list[int]]:
    """Encode a row with its last answer; the answer and its stop token have labels."""
    prompt = prompt_ids(speaker, row, images)
    ids = written_ids(speaker.processor, written_messages(row), _image_tokens(speaker, row, images), answered=True)
    pairs = enumerate(zip(prompt, ids, strict=False))
    start = next((place for place, (ours, whole) in pairs if ours != whole), len(prompt))
    stops = (place + 1 for place in range(start, len(ids)) if ids[place] in speaker.stop.ids)
    ids = ids[: next(stops, len(ids))]
    return ids, [IGNORE_INDEX] * start + ids[start:]


def written_messages(row: Conversation) -> list[dict[str, Any]]:
    """Return the turns of a row as messages of text and image parts, for a processor."""
    messages = []
    for turn in row.turns:
        pieces = turn.text.split(IMAGE_PLACEHOLDER)
        parts: list[dict[str, Any]] = []
        for place, piece in enumerate(pieces):
            text = without_marks(piece)
            text = text.strip("\n") if len(pieces) > 1 else text  # the template adds the line break at an image
            parts += [{"type": "image"}] * (place > 0)
            parts += [{"type": "text", "text": text}] * bool(text or len(pieces) == 1)
        messages.append({"role": turn.role, "content": parts})
    return messages


def _image_tokens(speaker: Speaker, row: Conversation, images: SplitImages) -> int | list[int]:
    """Return the tokens of an image, or of each of a row's; a LLaVA-1.6 counts an image that cannot be read as none."""
    config = llava_of(speaker.model).config
    if tiling_of(config) is None:
        return image_tokens(config)
    return [_tokens(config, images, name) for name in row.images]


def _tokens(config: Any, images: SplitImages, name: ImageName) -> int:
    try:
        image = images.open(name)
    except BadImageError:
        return 1  # reported when the question is asked
    return tokens_of_image(config, (image.height, image.width))


def weights_of(model: str, base_only: bool = False) -> dict[str, str]:
    """Return the hash of a run's adapter and the state of its base, or of a complete model."""
    folder = Path(model)
    if not is_run(folder):
        return {"base": weights_state(folder) if folder.is_dir() else model}
    base = Path(checked_base(read_record(folder), folder))
    adapter = {} if base_only else {"adapter": file_hash(folder / ADAPTER_FILE)}
    return adapter | {"base": weights_state(base) if base.is_dir() else str(base)}
