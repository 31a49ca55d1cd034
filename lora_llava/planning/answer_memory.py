"""Memory of a batch of questions, and how many of a run's evaluation fit at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_llava.model.families.decoder_shape import attention_widths
from lora_llava.planning.memory import Step, usable
from lora_llava.planning.memory_budget import memory_budget
from lora_llava.recipe import Recipe

_OF_TRAINING = (
    "16-bit copies of trained weights",
    "gradients",
    "optimizer",
    "activations, kept",
    "vision tower, kept",
    "one layer's working set",
    "dequantized weight",
)
"""Parts of a step's memory that answers before and after training do not have."""


def answer_bytes(
    text: Any,
    size: int,
    tokens: int,
    *,
    new_tokens: int = 0,
    logits: int = 1,
    cached: bool = True,
    all_states: bool = False,
    adapter: bool = True,
) -> int:
    """Return the bytes that one question of a batch needs besides the weights.

    Args:
        text: The language model's config.
        size: Bytes of a value of its computations.
        tokens: Tokens of the prompt.
        new_tokens: Most tokens of the answer.
        logits: Positions whose logits are computed.
        cached: Whether keys and values are kept, as generation does.
        all_states: Whether the states after every layer are kept.
        adapter: Whether the linear layers have adapters.

    Returns:
        The larger of the bytes of the first pass over the prompt, and of the last step, if the answer is as long as
        it may be. A 7B model in bfloat16 keeps 512 KiB of keys and values per token: 32 layers x 2 x 4,096 x 2 bytes.
    """
    _, keys = attention_widths(text)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    # The states of the layer, its queries, keys, values and output, the MLP's three products, and with adapters in
    # float32 their output before and after it is scaled (peft/tuners/lora/bnb.py, Linear4bit.forward).
    per_token = size * (5 * text.hidden_size + 3 * inner) + (2 * 4 * inner if adapter else 0)
    head = logits * text.vocab_size * (size + 2 * 4)  # logits, in float32, and their log-softmax
    first = tokens * per_token + tokens * tokens * (1 + size) + head  # with the mask, and its copy in the scores' dtype
    if all_states:
        first += tokens * (text.num_hidden_layers + 1) * text.hidden_size * size
    if not cached:
        return int(first)
    kept = 2 * text.num_hidden_layers * keys * size
    largest = tokens + new_tokens
    # A step copies the keys or the values of one layer to add those of one token (transformers, DynamicCache).
    last = kept * largest + keys * size * largest + per_token + head
    return int(max(kept * tokens + first, last))


@dataclass(frozen=True)
class AnswerPlan:
    """The largest batch of a run's evaluation.

    Attributes:
        questions: Questions at once, at most `evaluation.batch_size`.
        peak: Bytes with the weights.
        fits: False if a single question does not fit.
    """

    questions: int
    peak: int
    fits: bool


def plan_answers(recipe: Recipe, step: Step, longest: int) -> AnswerPlan | None:
    """Plan the answers before and after training.

    Args:
        recipe: The recipe.
        step: The run's step.
        longest: Tokens of the longest question.

    Returns:
        The plan; None without such answers.
    """
    evaluation = recipe.evaluation
    if evaluation is None or not (evaluation.before or evaluation.after):
        return None
    weights = sum(size for part, size in step.parts().items() if part not in _OF_TRAINING)
    text = step.config.text_config
    each = answer_bytes(text, step.dtype_bytes, longest, new_tokens=evaluation.max_new_tokens)
    free = usable(step, memory_budget(recipe)[0]) - weights
    questions = max(1, min(evaluation.batch_size, free // each))
    return AnswerPlan(questions, weights + questions * each, each <= free)
