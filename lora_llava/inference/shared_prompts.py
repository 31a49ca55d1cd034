"""Questions about one image: the beginning of their prompts is computed once, and its keys and values are reused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version

from lora_llava.inference.answer import Answer
from lora_llava.inference.question import EncodedImages, Question, left_padded
from lora_llava.model.vision import llava_of

CACHE_ARGUMENT = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
"""The name of a model's argument for the keys and values of earlier tokens (transformers 5.24, generation/utils.py)."""


class SharedPrompt(NamedTuple):
    """The beginning that the prompts of several questions share: all tokens up to the end of their last image.

    Attributes:
        ids: Its token ids.
        images: Names of its images.
    """

    ids: tuple[int, ...]
    images: tuple[Any, ...]


def shared_prompts(
    model: Any, questions: Sequence[Question] | Mapping[int, Question], indices: Iterable[int]
) -> dict[int, SharedPrompt]:
    """Find the questions whose prompts begin alike.

    Args:
        model: A LLaVA, with or without an adapter; with a sliding window nothing is shared, as padding between prefix
            and question would move the window.
        questions: The questions.
        indices: Those to answer.

    Returns:
        The shared beginning of each question that has one.
    """
    config = llava_of(model).config
    text = config.text_config
    kinds = getattr(text, "layer_types", None) or ()
    if getattr(text, "sliding_window", None) is not None or any(kind != "full_attention" for kind in kinds):
        return {}
    found = {}
    for index in indices:
        ids, images = questions[index].input_ids, questions[index].image_files
        if images:
            last = len(ids) - 1 - list(reversed(ids)).index(config.image_token_index)
            found[index] = SharedPrompt(tuple(ids[: last + 1]), tuple(images))
    counts = Counter(found.values())
    return {index: prompt for index, prompt in found.items() if counts[prompt] > 1}


def in_groups(
    questions: Sequence[Question] | Mapping[int, Question], indices: Iterable[int], shared: Mapping[int, SharedPrompt]
) -> list[int]:
    """Order questions, longest first; the questions of a shared prompt behind its longest one."""
    order = sorted(indices, key=lambda i: -len(questions[i].input_ids))
    places: dict[SharedPrompt, int] = {}
    for place, index in enumerate(order):
        if index in shared:
            places.setdefault(shared[index], place)
    key = {index: places[shared[index]] if index in shared else place for place, index in enumerate(order)}
    return sorted(order, key=key.__getitem__)


def split_batch(chosen: Sequence[int], shared: Mapping[int, SharedPrompt]) -> list[tuple[list[int], bool]]:
    """Split a batch into questions that are computed together, and whether they continue shared prompts.

    Shared prompts of different lengths are not computed together, as their keys cannot be padded.
    """
    used = Counter(shared[i] for i in chosen if i in shared)
    parts: dict[int, list[int]] = {}
    for index in chosen:
        continued = index in shared and used[shared[index]] > 1
        parts.setdefault(len(shared[index].ids) if continued else 0, []).append(index)
    return [(part, length > 0) for length, part in parts.items()]


class Begun(NamedTuple):
    """Questions whose shared prompts have been computed.

    Attributes:
        indices: The questions, without those with a bad image.
        cache: Keys and values of the shared prompts, a copy for each question.
        before: Token ids of the shared prompts, int64 of shape (questions, tokens).
        rest: `input_ids` and `attention_mask` of the tokens behind them, padded on the left.
        problems: Answers for questions with a bad image.
    """

    indices: list[int]
    cache: Any
    before: torch.Tensor
    rest: dict[str, torch.Tensor]
    problems: dict[int, Answer]

    def mask(self) -> torch.Tensor:
        """Return the attention mask of all tokens, int64 of shape (questions, tokens)."""
        return torch.cat([torch.ones_like(self.before), self.rest["attention_mask"]], dim=1)

    def as_generate(self) -> dict[str, Any]:
        """Return the arguments with which `generate` continues."""
        ids = torch.cat([self.before, self.rest["input_ids"]], dim=1)
        return {"input_ids": ids, "attention_mask": self.mask(), CACHE_ARGUMENT: self.cache}


def begin_prompts(
    model: Any,
    chosen: Sequence[int],
    questions: Sequence[Question] | Mapping[int, Question],
    shared: Mapping[int, SharedPrompt],
    encoded: EncodedImages,
    pad_token_id: int,
) -> Begun:
    """Compute the shared prompts of a batch, each once.

    Args:
        model: A LLaVA, with or without an adapter.
        chosen: Questions whose shared prompts have equal lengths.
        questions: All questions.
        shared: From `shared_prompts`.
        encoded: The images.
        pad_token_id: Padding between the shared prompt and shorter questions.
    """
    firsts = {shared[i]: i for i in reversed(chosen)}
    prompts = {i: Question(prompt.ids, prompt.images) for prompt, i in firsts.items()}
    batch, failed = encoded.batch(list(prompts), prompts, pad_token_id)
    good = [i for i in prompts if i not in failed]
    kept = [i for i in chosen if firsts[shared[i]] in good]
    problems = {i: failed[firsts[shared[i]]] for i in chosen if firsts[shared[i]] in failed}
    if not kept:
        return Begun([], None, torch.empty(0, 0), {}, problems)
    with encoded.as_pixels():
        cache = model(**batch, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_select_indices(torch.tensor([good.index(firsts[shared[i]]) for i in kept], device=encoded.device))
    rest = left_padded([questions[i].input_ids[len(shared[i].ids) :] for i in kept], pad_token_id)
    before = torch.tensor([shared[i].ids for i in kept], device=encoded.device)
    return Begun(kept, cache, before, {name: tensor.to(encoded.device) for name, tensor in rest.items()}, problems)


def rows_of(
    model: Any,
    chosen: Sequence[int],
    questions: Sequence[Question] | Mapping[int, Question],
    begins: Mapping[int, SharedPrompt] | None,
    encoded: EncodedImages,
    pad_token_id: int,
) -> tuple[list[int], dict[str, Any], dict[int, Answer]]:
    """Prepare the model's pass over one part of a batch (`split_batch`).

    Args:
        model: A LLaVA, with or without an adapter.
        chosen: The questions of the part.
        questions: All questions.
        begins: Their shared prompts, which are computed here; None if the part continues none.
        encoded: The images.
        pad_token_id: Token id for padding on the left.

    Returns:
        The questions that have their images, the arguments of the pass, and answers for the others. With shared
        prompts, `input_ids` are the tokens behind them, and `attention_mask` is of all tokens.
    """
    if begins is not None:
        begun = begin_prompts(model, chosen, questions, begins, encoded, pad_token_id)
        if not begun.indices:
            return [], {}, begun.problems
        batch = {"input_ids": begun.rest["input_ids"], "attention_mask": begun.mask(), CACHE_ARGUMENT: begun.cache}
        return begun.indices, batch, begun.problems
    batch, failed = encoded.batch(chosen, questions, pad_token_id)
    return [i for i in chosen if i not in failed], batch, failed
