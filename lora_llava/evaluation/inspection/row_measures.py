"""What a model makes of each row: the loss of its answer with, with another and without its image, and features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from lora_llava.data.conversation import Conversation, EncodingError
from lora_llava.data.encode import IGNORE_INDEX, encode_conversation
from lora_llava.data.images.image_id import ImageName
from lora_llava.evaluation.answerers import Evaluator, messages_of
from lora_llava.evaluation.inspection.inspected_rows import without_images
from lora_llava.evaluation.row_evaluation import shuffle_images
from lora_llava.inference.batches import Batches, question_bytes
from lora_llava.inference.likelihood import first_label
from lora_llava.inference.question import EncodedImages, Question
from lora_llava.inference.shared_prompts import CACHE_ARGUMENT, in_groups, rows_of, shared_prompts, split_batch

SHUFFLES = 3
"""Shuffled images of a row that seems to gain nothing: one alone may show the same answer by chance."""
GAIN_MARGIN = 0.05
"""Nats per answer token below which an image counts as no gain."""
_DEPTH = 0.75
"""Share of the language model's layers below the state that is compared: on the demo's world, three of four layers
found more planted faults than two or all four (tests/benchmarks/inspect_planted.py)."""
_GRID = 4
"""Patches of an image are averaged over a grid of this many rows and columns, so that places count."""
_PROJECTED = 512
"""Numbers that are kept of an image; more are projected at random, which keeps cosines near 1 within 0.01."""
_ALWAYS = 1 << 60
"""Uses of an image that never run out."""


@dataclass
class Measures:
    """The measures of some rows; NaN where there is none.

    Attributes:
        own: Nats per answer token with the row's images, float64 of shape (rows,), as are the next five.
        tokens: Answer tokens, with the stop.
        surprise: Nats per answer token above what the model expected, by the entropy of its predictions.
        shuffled: Mean nats per answer token with images of other rows.
        shuffles: Shuffled images in that mean.
        blank: Nats per answer token without an image.
        states: The language model's state before the answer, float16 of shape (rows, hidden size).
        images: Averaged tower features of each image, float32 of shape (numbers,), by its name.
        problems: Why a row has no measures, by its index.
    """

    own: np.ndarray
    tokens: np.ndarray
    surprise: np.ndarray
    shuffled: np.ndarray
    shuffles: np.ndarray
    blank: np.ndarray
    states: np.ndarray
    images: dict[ImageName, np.ndarray]
    problems: dict[int, str]


ROWS = "rows", "lower data.max_length"
"""What `Batches` says of rows that do not fit into memory."""


class RecordedImages(EncodedImages):
    """Encoded images that stay for all passes over some rows, with averaged features of each.

    Args:
        evaluator: The model.
        rows: Rows that name the images.
    """

    def __init__(self, evaluator: Evaluator, rows: Sequence[Conversation]) -> None:
        questions = [Question((), row.images) for row in rows]
        super().__init__(evaluator.model, evaluator.load_pixels, questions, range(len(rows)))
        self.uses = Counter(dict.fromkeys(self.uses, _ALWAYS))
        self.averaged: dict[ImageName, np.ndarray] = {}

    def _encode(self, names: Sequence[ImageName]) -> None:
        super()._encode(names)
        for name in names:
            if name in self._held and name not in self.averaged:
                self.averaged[name] = average_patches(self._held[name][0])  # of the whole image


def average_patches(features: torch.Tensor) -> np.ndarray:
    """Average an image's patch features over a coarse grid.

    Args:
        features: Shape (patches, features).

    Returns:
        Float32 of shape (numbers,), at most `_PROJECTED`.
    """
    features = features.float().cpu()
    side = int(len(features) ** 0.5)
    if side * side == len(features) and side > _GRID:
        square = features.T.reshape(1, -1, side, side)
        features = functional.adaptive_avg_pool2d(square, _GRID)[0].flatten(1).T
    flat = features.flatten()
    if len(flat) > _PROJECTED:
        flat = _projection(len(flat)) @ flat
    found: np.ndarray = flat.numpy()
    return found


_PROJECTIONS: dict[int, torch.Tensor] = {}


def _projection(numbers: int) -> torch.Tensor:
    """Return a random projection, the same in every process."""
    if numbers not in _PROJECTIONS:
        generator = torch.Generator().manual_seed(0)
        _PROJECTIONS[numbers] = torch.randn(_PROJECTED, numbers, generator=generator) / _PROJECTED**0.5
    return _PROJECTIONS[numbers]


@dataclass(frozen=True)
class _Answered:
    loss: float
    tokens: int
    entropy: float
    state: np.ndarray | None


def measure_rows(
    evaluator: Evaluator, rows: Sequence[Conversation], seed: int, batches: Batches | None = None
) -> Measures:
    """Measure rows that are shuffled among themselves.

    Args:
        evaluator: The model.
        rows: Conversations that end with the answer of the data.
        seed: Seed of the shuffles.
        batches: Batches that know what fitted into memory before; None begins with the evaluator's size.

    Returns:
        The measures.
    """
    images = RecordedImages(evaluator, rows)
    batches = batches or Batches(evaluator.batch_size, *ROWS)
    everything = dict(enumerate(rows))
    problems: dict[int, str] = {}
    own = _measure(evaluator, batches, everything, images, problems, with_state=True)
    sound = {i: row for i, row in everything.items() if i in own}
    shuffled: dict[int, list[float]] = {i: [] for i in sound}
    for number in range(SHUFFLES):
        order = list(sound)
        other = dict(zip(order, shuffle_images([rows[i] for i in order], seed + number), strict=True))
        asked = {i: row for i, row in other.items() if row.images != rows[i].images}
        if number:
            asked = {i: row for i, row in asked.items() if shuffled[i] and _gain(shuffled[i], own[i]) <= GAIN_MARGIN}
        for i, found in _measure(evaluator, batches, asked, images, {}).items():
            shuffled[i].append(found.loss / found.tokens)
    bare = {i: without_images(row) for i, row in sound.items() if row.images}
    blank = _measure(evaluator, batches, bare, images, {})

    def column(values: Mapping[int, float]) -> np.ndarray:
        return np.array([values.get(i, np.nan) for i in range(len(rows))])

    size = len(next((found.state for found in own.values() if found.state is not None), ()))
    states = np.full((len(rows), size), np.nan, dtype=np.float16)
    for i, found in own.items():
        states[i] = found.state
    return Measures(
        column({i: found.loss / found.tokens for i, found in own.items()}),
        column({i: found.tokens for i, found in own.items()}),
        column({i: (found.loss - found.entropy) / found.tokens for i, found in own.items()}),
        column({i: float(np.mean(losses)) for i, losses in shuffled.items() if losses}),
        column({i: len(losses) for i, losses in shuffled.items()}),
        column({i: found.loss / found.tokens for i, found in blank.items()}),
        states,
        images.averaged,
        problems,
    )


def _gain(shuffled: Sequence[float], own: _Answered) -> float:
    return float(np.mean(shuffled)) - own.loss / own.tokens


def _measure(
    evaluator: Evaluator,
    batches: Batches,
    rows: Mapping[int, Conversation],
    images: EncodedImages,
    problems: dict[int, str],
    *,
    with_state: bool = False,
) -> dict[int, _Answered]:
    """Measure the answers of rows; one that cannot be encoded, or whose image cannot be opened, is put in problems."""
    encoded: dict[int, Any] = {}
    for i, row in rows.items():
        try:
            encoded[i] = encode_conversation(
                messages_of(row),
                tokenizer=evaluator.tokenizer,
                template=evaluator.template,
                num_image_tokens=evaluator.num_image_tokens(row.images),
            )
        except EncodingError as error:
            problems[i] = str(error)
    for i in [i for i, found in encoded.items() if found["labels"][0] != IGNORE_INDEX]:
        del encoded[i]
        problems[i] = "nothing stands before its answer, not even the tokenizer's first token"
    model, pad = evaluator.model, evaluator.tokenizer.pad_token_id
    questions = {i: Question(row["input_ids"], rows[i].images) for i, row in encoded.items()}
    # The token before the answer is computed with the answer: it predicts its first token, and its state is kept.
    begins = shared_prompts(model, questions, questions)
    begins = {i: prompt for i, prompt in begins.items() if first_label(encoded[i]["labels"]) > len(prompt.ids)}

    def forward(chosen: list[int]) -> dict[int, _Answered]:
        return {i: one for part in split_batch(chosen, begins) for i, one in forward_part(*part).items()}

    def forward_part(chosen: list[int], continued: bool) -> dict[int, _Answered]:
        indices, batch, failed = rows_of(model, chosen, questions, begins if continued else None, images, pad)
        problems.update((i, str(answer.problem)) for i, answer in failed.items())
        if not indices:
            return {}
        before = batch["attention_mask"].shape[1] - batch["input_ids"].shape[1]
        labels = [encoded[i]["labels"][before:] for i in indices]
        return dict(zip(indices, _forward(model, batch, labels, images, with_state), strict=True))

    def needed(index: int) -> int:
        labels = encoded[index]["labels"]
        answer = len(labels) - first_label(labels)
        return question_bytes(evaluator.model, len(labels), logits=answer + 1, cached=False, all_states=with_state)

    found: dict[int, _Answered] = {}
    for _, measured in batches.run(in_groups(questions, questions, begins), forward, needed):
        found |= measured
    return found


@torch.inference_mode()
def _forward(
    model: Any,
    batch: dict[str, torch.Tensor],
    labels: Sequence[Sequence[int]],
    images: EncodedImages,
    with_state: bool,
) -> list[_Answered]:
    """Run one batch, padded on the left; labels are those of each row's tokens in the batch, without padding."""
    model.eval()
    longest = batch["input_ids"].shape[1]
    places = [
        [longest - len(row) + place for place, label in enumerate(row) if label != IGNORE_INDEX] for row in labels
    ]
    keep = longest - min(row[0] for row in places) + 1
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, -longest:]
    with images.as_pixels():
        output = model(
            **batch,
            position_ids=positions,
            use_cache=CACHE_ARGUMENT in batch,
            logits_to_keep=keep,
            output_hidden_states=with_state,
        )
    states = output.hidden_states[round(_DEPTH * (len(output.hidden_states) - 1))] if with_state else None
    found = []
    for row, mine in enumerate(places):
        at = torch.tensor(mine, device=batch["input_ids"].device)
        log = functional.log_softmax(output.logits[row, at - 1 - (longest - keep)].float(), dim=-1)
        loss = -log.gather(1, batch["input_ids"][row, at].unsqueeze(1)).sum()
        entropy = -(log.exp() * log).sum()
        state = states[row, mine[0] - 1].float().clamp(-6e4, 6e4).half().cpu().numpy() if states is not None else None
        found.append(_Answered(float(loss), len(mine), float(entropy), state))
    return found
