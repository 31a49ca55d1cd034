"""Choices scored in one row get the log-likelihood that each has alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.data.images.image_sources import BadImageError
from lora_llava.evaluation.answerers import Evaluator, by_likelihood, by_reasoned_likelihood, reference_losses
from lora_llava.inference.answer import Answer
from lora_llava.inference.likelihood import answer_losses, build_tree
from lora_llava.inference.sampling import Sampling


@given(
    shared=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    own=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=2, max_size=4),
)
def test_a_tree_holds_every_choice(shared: list[int], own: list[list[int]]) -> None:
    rows = [[*shared, *tail, 9 + place] for place, tail in enumerate(own)]  # each ends in a unique id
    tree = build_tree(rows)
    assert [tree.input_ids[: tree.shared] + tree.input_ids[a:b] for a, b in tree.branches] == rows
    assert len({row[tree.shared] for row in rows}) > 1
    assert len(tree.input_ids) == tree.shared + sum(len(row) - tree.shared for row in rows)


@pytest.mark.parametrize("rows", [[[1, 2], [1, 2]], [[1, 2], [1, 2, 3]]])
def test_choices_that_cannot_be_distinguished_are_rejected(rows: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="cannot be distinguished"):
        build_tree(rows)


def alone(asked: Evaluator, row: Any, texts: Sequence[str]) -> list[float]:
    """Compute the slow reference: one forward pass per choice, the loss over all its labelled tokens."""
    found = []
    for text in texts:
        ids, labels = asked.with_answer(row, text)
        pixels = {"pixel_values": asked.load_pixels(row.images)} if row.images else {}
        with torch.inference_mode():
            logits = asked.model(input_ids=torch.tensor([ids]), use_cache=False, **pixels).logits[0].log_softmax(-1)
        places = [i for i, label in enumerate(labels) if label != -100]
        found.append(float(sum(logits[i - 1, ids[i]] for i in places)))
    return found


TEXTS = ("red", "It is blue, I think.", "The answer is A.", "The answer is B.")


@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_are_those_of_each_choice_alone(speaking: Any, batch_size: int) -> None:
    asked, rows = speaking
    asked = Evaluator(
        asked.model, asked.tokenizer, asked.template, asked.num_image_tokens, asked.load_pixels, batch_size
    )
    chosen = {"0": TEXTS, "1": TEXTS[2:], "2": TEXTS[:2]}
    answerer = by_likelihood(asked, lambda row, reasons: chosen[str(int(row.row_id) % 3)])
    answers = dict(answerer(rows, frozenset()))
    assert sorted(answers) == list(range(12))
    for index, answer in answers.items():
        texts = chosen[str(int(rows[index].row_id) % 3)]
        expected = alone(asked, rows[index], texts)
        assert answer.scores is not None
        # The reference includes the shared tokens, the scores do not: only differences between choices matter.
        gaps = [score - wanted for score, wanted in zip(answer.scores, expected, strict=True)]
        assert gaps == pytest.approx([gaps[0]] * len(gaps), abs=2e-4)
        assert answer.text == texts[expected.index(max(expected))]
    assert len({answer.text for answer in answers.values()}) > 1


def test_answered_questions_are_skipped(speaking: Any) -> None:
    asked, rows = speaking
    answerer = by_likelihood(asked, lambda row, reasons: TEXTS[:2])
    assert sorted(i for i, _ in answerer(rows, {1, 2})) == [0, *range(3, 12)]


def test_reasons_are_written_before_the_choice(speaking: Any) -> None:
    asked, rows = speaking
    given: dict[str, str] = {}

    def choices(row: Any, reasons: str) -> list[str]:
        given[row.row_id] = reasons
        return [f"{reasons} The answer is {letter}." for letter in "AB"]

    answers = dict(by_reasoned_likelihood(asked, Sampling(max_new_tokens=6), choices)(rows, {4}))
    assert sorted(answers) == [0, 1, 2, 3, *range(5, 12)]
    for index, answer in answers.items():
        reasons = given[rows[index].row_id]
        texts = [f"{reasons} The answer is {letter}." for letter in "AB"]
        expected = alone(asked, rows[index], texts)
        assert answer.text == texts[expected.index(max(expected))]
    assert len(set(given.values())) > 3


def test_a_missing_image_is_a_problem_of_its_question_only(speaking: Any) -> None:
    asked, rows = speaking
    gone, load_pixels = next(row for row in rows if row.images).images[0], asked.load_pixels

    def images(names: Sequence[str]) -> torch.Tensor:
        if gone in names:
            raise BadImageError("gone")
        return load_pixels(names)

    asked = Evaluator(asked.model, asked.tokenizer, asked.template, asked.num_image_tokens, images, 5)
    lost = next(i for i, row in enumerate(rows) if gone in row.images)
    for answerer in (
        by_likelihood(asked, lambda row, reasons: TEXTS[:2]),
        by_reasoned_likelihood(asked, Sampling(max_new_tokens=2), lambda row, reasons: TEXTS[:2]),
    ):
        answers = dict(answerer(rows, frozenset()))
        assert answers[lost] == Answer("", problem="gone", is_image=True)
        assert [i for i, answer in answers.items() if answer.problem] == [lost]
        assert len(answers) == 12
    assert sorted(reference_losses(asked, rows)) == [i for i in range(12) if i != lost]


def test_the_loss_of_a_reference_answer_is_that_of_its_tokens(speaking: Any) -> None:
    asked, rows = speaking
    losses = reference_losses(asked, rows)
    for index, (loss, tokens) in losses.items():
        row = rows[index]
        text = row.turns[-1].text
        assert loss == pytest.approx(-alone(asked, row, [text])[0], abs=2e-3)
        assert tokens == sum(label != -100 for label in asked.with_answer(row, text)[1])


def test_only_the_last_of_several_answers_is_labelled(speaking: Any) -> None:
    asked, rows = speaking
    row = rows[1]
    longer = type(row)("x", (*row.turns, row.turns[0], row.turns[1]), row.images * 2)
    ids, labels = asked.with_answer(longer, "red")
    assert ids[: len(asked.prompt(longer))] == asked.prompt(longer)
    assert labels[: len(asked.prompt(longer))] == [-100] * len(asked.prompt(longer))
    assert labels[len(asked.prompt(longer)) :] == ids[len(asked.prompt(longer)) :]


def test_greedy_answers_are_recognised(speaking: Any) -> None:
    asked, rows = speaking
    prompts = [asked.prompt(row) for row in rows if not row.images][:3]
    encoded = []
    for prompt in prompts:
        with torch.inference_mode():
            ids = asked.model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=3, do_sample=False)[0].tolist()
        encoded.append((ids, [-100] * len(prompt) + ids[len(prompt) :]))
    ids, labels = encoded[0]
    encoded.append(([*ids[:-1], 5], [*labels[:-1], 5]))
    assert ids[-1] != 5
    found = answer_losses(asked.model, encoded, [()] * 4, load_pixels=asked.load_pixels, batch_size=2, pad_token_id=0)
    assert {each[0]: each[3] for each in found} == {0: True, 1: True, 2: True, 3: False}
