"""Log-likelihood of given answers: score multiple choices, and compute the loss of reference answers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from lora_llava.data.encode import IGNORE_INDEX
from lora_llava.data.images.image_id import ImageName
from lora_llava.data.images.image_sources import PixelLoader
from lora_llava.inference.answer import Answer
from lora_llava.inference.batches import Batches, question_bytes
from lora_llava.inference.question import EncodedImages, Question
from lora_llava.inference.shared_prompts import (
    in_groups,
    rows_of,
    shared_prompts,
    split_batch,
)
from lora_llava.model.vision import dtype_of


@dataclass(frozen=True)
class Choices:
    """A question with its possible answers.

    Attributes:
        texts: The text of each answer.
        encoded: `input_ids` and `labels` of the conversation ending in each answer; labels are -100 before the answer.
        image_files: Names of its images, in order.
    """

    texts: Sequence[str]
    encoded: Sequence[tuple[Sequence[int], Sequence[int]]]
    image_files: Sequence[ImageName] = ()


@dataclass(frozen=True)
class Tree:
    """The choices of a question in one row: the shared prefix once, then the rest of each choice.

    Attributes:
        input_ids: The shared ids, then the remaining ids of each choice.
        shared: Number of shared ids.
        branches: Start and end of each choice's remaining ids.
    """

    input_ids: list[int]
    shared: int
    branches: list[tuple[int, int]]


def build_tree(choices: Sequence[Sequence[int]]) -> Tree:
    """Put the choices of a question into one row behind their shared prefix.

    Args:
        choices: Token ids of the conversation with each choice; none may be a prefix of another.

    Returns:
        The row.

    Raises:
        ValueError: If a choice equals another or is its prefix.
    """
    shared = 0
    shortest = min(map(len, choices))
    while shared < shortest and len({row[shared] for row in choices}) == 1:
        shared += 1
    if shared == shortest:
        raise ValueError("a choice equals another or is its prefix; they cannot be distinguished")
    ids, branches = list(choices[0][:shared]), []
    for row in choices:
        branches.append((len(ids), len(ids) + len(row) - shared))
        ids += row[shared:]
    return Tree(ids, shared, branches)


@torch.inference_mode()
def weigh_choices(
    model: Any,
    questions: Sequence[Choices],
    *,
    load_pixels: PixelLoader,
    batch_size: int | Batches,
    pad_token_id: int,
    answered: Collection[int] = (),
    encoded: EncodedImages | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Choose answers by their log-likelihood, with one forward pass per batch that computes shared prefixes once.

    Each branch attends to the shared prefix and to itself, and its positions continue from the prefix. Its logits
    therefore equal those of its conversation alone.

    Args:
        model: A LLaVA, with or without an adapter.
        questions: The questions with their choices.
        load_pixels: Loads the images that questions name.
        batch_size: Most questions per batch.
        pad_token_id: Token id for padding on the left.
        answered: Indices to skip, because their answers exist.
        encoded: Encoded images shared with other calls; None encodes them for this call.

    Yields:
        The question's index and its likeliest choice, with the log-likelihood in nats of each choice's answer tokens
        behind the shared prefix.

    Raises:
        ValueError: If two choices of a question cannot be distinguished.
    """
    trees = [build_tree([ids for ids, _ in question.encoded]) for question in questions]
    rows = [Question(tree.input_ids, q.image_files) for tree, q in zip(trees, questions, strict=True)]
    left = [i for i in range(len(rows)) if i not in answered]
    encoded = encoded or EncodedImages(model, load_pixels, rows, left)
    own = [len(tree.input_ids) - tree.shared for tree in trees]
    longest_own = max(own, default=0)
    # The last shared token of the choices predicts their first own one, and must be computed with them.
    begins = shared_prompts(model, rows, left)
    begins = {i: prompt for i, prompt in begins.items() if trees[i].shared > len(prompt.ids)}
    model.eval()

    def weigh(chosen: list[int]) -> dict[int, Answer]:
        return {i: one for part in split_batch(chosen, begins) for i, one in weigh_part(*part).items()}

    def weigh_part(chosen: list[int], continued: bool) -> dict[int, Answer]:
        indices, batch, found = rows_of(model, chosen, rows, begins if continued else None, encoded, pad_token_id)
        if not indices:
            return found
        before = batch["attention_mask"].shape[1] - batch["input_ids"].shape[1]
        mask, positions = _tree_mask([trees[i] for i in indices], batch["attention_mask"].shape[1], before)
        own_inputs = {
            "attention_mask": _additive(mask[:, :, before:], dtype_of(model)).to(encoded.device),
            "position_ids": positions[:, before:].to(encoded.device),
        }
        with encoded.as_pixels():
            keep = max(own[i] for i in indices) + 1
            logits = model(**batch | own_inputs, use_cache=continued, logits_to_keep=keep).logits
        log_probabilities = functional.log_softmax(logits.float(), dim=-1).cpu()
        for row, i in enumerate(indices):
            answer = Answer("", scores=_scores(log_probabilities[row], trees[i], questions[i]))
            found[i] = replace(answer, text=questions[i].texts[answer.choice or 0])
        return found

    def needed(index: int) -> int:
        return question_bytes(model, len(rows[index].input_ids), logits=longest_own + 1, cached=False)

    for chosen, found in Batches.of(batch_size).run(in_groups(rows, left, begins), weigh, needed):
        encoded.release(chosen, rows)
        yield from found.items()


def _scores(log_probabilities: torch.Tensor, tree: Tree, question: Choices) -> tuple[float, ...]:
    """Sum the log-probabilities of each branch's labelled tokens; the last shared token predicts the first of them."""
    end = len(tree.input_ids)
    kept = len(log_probabilities)
    scores = []
    for (first, last), (_, labels) in zip(tree.branches, question.encoded, strict=True):
        total = 0.0
        for place in range(first, last):
            if labels[tree.shared + place - first] == IGNORE_INDEX:
                continue
            before = place - 1 if place > first else tree.shared - 1
            total += float(log_probabilities[kept - end + before, tree.input_ids[place]])
        scores.append(total)
    return tuple(scores)


def _tree_mask(trees: Sequence[Tree], longest: int, before: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention mask, bool of shape (rows, 1, tokens, tokens), and positions, shape (rows, tokens).

    Args:
        trees: The rows.
        longest: Tokens, padding included.
        before: Tokens of the prompt that stand before the padding.
    """
    mask = torch.eye(longest, dtype=torch.bool).repeat(len(trees), 1, 1, 1)  # padding attends to itself: no empty row
    positions = torch.zeros(len(trees), longest, dtype=torch.long)
    for row, tree in enumerate(trees):
        length = len(tree.input_ids)
        own = torch.zeros(length, length, dtype=torch.bool)
        own[:, : tree.shared] = True
        place = torch.arange(length)
        for first, last in tree.branches:
            own[first:last, first:last] = True
            place[first:last] = torch.arange(tree.shared, tree.shared + last - first)
        columns = torch.cat([torch.arange(before), torch.arange(longest - length + before, longest)])
        mask[row, 0, columns[:, None], columns] = own.tril()
        positions[row, columns] = place
    return mask, positions


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a mask to 0 and the dtype's minimum, the form that every attention implementation accepts."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def first_label(labels: Sequence[int]) -> int:
    """Return the place of the first label of a row; 0 without one."""
    return next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), 0)


@torch.inference_mode()
def answer_losses(
    model: Any,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    image_files: Sequence[Sequence[ImageName]],
    *,
    load_pixels: PixelLoader,
    batch_size: int,
    pad_token_id: int,
) -> Iterator[tuple[int, float, int, bool]]:
    """Compute the loss of given answers.

    Args:
        model: A LLaVA, with or without an adapter.
        rows: `input_ids` and `labels` of each conversation; labels are -100 outside the answer.
        image_files: Names of each conversation's images.
        load_pixels: Loads images by name.
        batch_size: Most conversations per batch.
        pad_token_id: Token id for padding on the left.

    Yields:
        The row's index, summed cross-entropy in nats, count of labelled tokens, and whether each of them is the
        likeliest. Rows with an image that cannot be opened are skipped.
    """
    questions = [Question(ids, files) for (ids, _), files in zip(rows, image_files, strict=True)]
    encoded = EncodedImages(model, load_pixels, questions, range(len(questions)))
    longest_answer = max((len(labels) - first_label(labels) for _, labels in rows), default=0)
    model.eval()

    # The last token of a shared prompt may predict none of an answer: its logits are not computed with the answer.
    begins = shared_prompts(model, questions, range(len(questions)))
    begins = {i: prompt for i, prompt in begins.items() if first_label(rows[i][1]) > len(prompt.ids)}

    def losses(chosen: list[int]) -> list[tuple[int, float, int, bool]]:
        return [one for part in split_batch(chosen, begins) for one in losses_of_part(*part)]

    def losses_of_part(chosen: list[int], continued: bool) -> list[tuple[int, float, int, bool]]:
        indices, batch, _ = rows_of(model, chosen, questions, begins if continued else None, encoded, pad_token_id)
        if not indices:
            return []
        longest = batch["input_ids"].shape[1]
        before = batch["attention_mask"].shape[1] - longest
        labels = torch.full((len(indices), longest), IGNORE_INDEX)
        for row, i in enumerate(indices):
            own = rows[i][1][before:]
            labels[row, longest - len(own) :] = torch.tensor(own)
        keep = int(longest - (labels != IGNORE_INDEX).any(0).nonzero()[0]) + 1
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, before:]
        with encoded.as_pixels():
            logits = model(**batch, position_ids=positions, use_cache=continued, logits_to_keep=keep).logits
        target = labels[:, -keep + 1 :]
        nats = functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2).cpu(), target, ignore_index=IGNORE_INDEX, reduction="none"
        )
        labelled = target != IGNORE_INDEX
        greedy = ((logits[:, :-1].argmax(-1).cpu() == target) | ~labelled).all(1)
        counts = labelled.sum(1)
        return [(i, float(nats[row].sum()), int(counts[row]), bool(greedy[row])) for row, i in enumerate(indices)]

    def needed(index: int) -> int:
        return question_bytes(model, len(rows[index][0]), logits=longest_answer + 1, cached=False)

    order = in_groups(questions, range(len(rows)), begins)
    for chosen, found in Batches(batch_size).run(order, losses, needed):
        encoded.release(chosen, questions)
        yield from found
