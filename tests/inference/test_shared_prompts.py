"""Questions about one image compute the beginning of their prompts once, and are answered as alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lora_llava.data.conversation import Turn
from lora_llava.data.images.image_sources import BadImageError
from lora_llava.evaluation.answerers import by_likelihood, reference_losses
from lora_llava.evaluation.inspection.row_measures import measure_rows
from lora_llava.inference.likelihood import answer_losses
from lora_llava.inference.question import Question
from lora_llava.inference.shared_prompts import in_groups, shared_prompts, split_batch
from tests.inference.test_generate import answers, questions_of

CHOICES = ("red", "It is blue, I think.", "The answer is A.")
TEXTS = ("What is it?", "Is it red, or is it another colour that has a longer name?", "Where?", "How many are there?")


@pytest.fixture
def asked_often(speaking: Any) -> tuple[Any, list[Question]]:
    """Four questions about each of three images, one about a fourth, and the questions without an image."""
    asked, rows = speaking
    with_image = [row for row in rows if row.images][:4]
    several = [
        replace(row, turns=(Turn("user", f"<image>\n{text}"), row.turns[-1]))
        for text in TEXTS
        for row in with_image[:3]
    ]
    return asked, questions_of(asked, [*several, with_image[3], *(row for row in rows if not row.images)])


@pytest.fixture
def passes(asked_often: Any) -> Iterator[list[tuple[int, int]]]:
    """Record the rows and tokens of every pass through the language model."""
    found: list[tuple[int, int]] = []
    language_model = asked_often[0].model.get_base_model().model.language_model

    def record(module: Any, args: Any, kwargs: Any) -> None:
        found.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    handle = language_model.register_forward_pre_hook(record, with_kwargs=True)
    yield found
    handle.remove()


@pytest.mark.parametrize("batch_size", [2, 4, 5, 8, 20])
def test_answers_equal_those_of_one_question_at_a_time(asked_often: Any, batch_size: int) -> None:
    asked, questions = asked_often
    alone = answers(asked, questions, batch_size=1)
    assert len({answer.text for answer in alone.values()}) > 6
    assert answers(asked, questions, batch_size=batch_size) == alone


def test_the_beginning_is_computed_once(asked_often: Any, passes: list[tuple[int, int]]) -> None:
    asked, questions = asked_often
    mine = questions[:12]
    before = len(shared_prompts(asked.model, mine, range(12))[0].ids)
    answers(asked, mine, batch_size=12)
    longest = max(len(question.input_ids) for question in mine)
    assert passes[:3] == [(3, before), (12, longest - before), (12, 1)]
    passes.clear()
    answers(asked, questions[:3], batch_size=3)  # one question about each image: nothing is shared
    assert passes[0] == (3, max(len(question.input_ids) for question in questions[:3]))


def test_a_bad_image_fails_for_all_its_questions(asked_often: Any) -> None:
    asked, questions = asked_often
    bad = questions[0].image_files[0]

    def load(names: Any) -> Any:
        if bad in names:
            raise BadImageError(f"{bad} is broken")
        return asked.load_pixels(names)

    found = answers(asked, questions, batch_size=6, load_pixels=load)
    assert sorted(i for i, answer in found.items() if answer.problem) == [0, 3, 6, 9]
    assert sorted(found) == list(range(len(questions)))


def test_groups_follow_their_longest_question() -> None:
    questions = [Question([1, 9, length, *range(length)], (name,)) for name, length in (("a", 3), ("b", 9), ("a", 12))]
    shared = dict.fromkeys((0, 2), ("prompt of a",))
    assert in_groups(questions, range(3), shared) == [2, 0, 1]  # type: ignore[arg-type]


def test_a_batch_is_split_by_the_length_of_its_shared_prompts(asked_often: Any) -> None:
    asked, questions = asked_often
    longer = [Question([5, 5, *question.input_ids], question.image_files) for question in questions[:6]]
    every = [*questions, *longer]
    shared = shared_prompts(asked.model, every, range(len(every)))
    assert 12 not in shared
    parts = split_batch([0, 3, 12, 19, 22, 1], shared)
    assert parts == [([0, 3], True), ([12, 1], False), ([19, 22], True)]


def test_nothing_is_shared_with_a_sliding_window(asked_often: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, questions = asked_often
    monkeypatch.setattr(asked.model.get_base_model().config.text_config, "sliding_window", 8, raising=False)
    assert shared_prompts(asked.model, questions, range(len(questions))) == {}


def test_losses_and_scores_equal_those_of_one_question_at_a_time(speaking: Any, passes: list[tuple[int, int]]) -> None:
    asked, rows = speaking
    with_image = next(row for row in rows if row.images)
    several = [
        replace(row, turns=(Turn("user", f"<image>\n{text}"), Turn("assistant", answer)), images=with_image.images)
        for row, text, answer in zip(rows, TEXTS, ("Red.", "It is a longer answer.", "Here", "Two."), strict=False)
    ] + rows[:2]
    alone, together = (replace(asked, batch_size=size) for size in (1, 6))
    expected = reference_losses(alone, several)
    passes.clear()
    found = reference_losses(together, several)
    assert [count for count, _ in passes] == [1, 5, 1]  # the beginning that five questions share, they, and the other
    for index, (loss, tokens) in expected.items():
        assert found[index] == (pytest.approx(loss, rel=1e-5), tokens)
    chosen = [
        dict(by_likelihood(each, lambda row, before: CHOICES)(several, frozenset())) for each in (alone, together)
    ]
    for index, answer in chosen[0].items():
        assert chosen[1][index].text == answer.text
        assert chosen[1][index].scores == pytest.approx(answer.scores, rel=1e-5)


def test_inspection_measures_equal_those_of_one_row_at_a_time(speaking: Any, passes: list[tuple[int, int]]) -> None:
    asked, rows = speaking
    images = [row.images for row in rows if row.images]
    several = [
        replace(row, turns=(Turn("user", f"<image>\n{text}"), Turn("assistant", answer)), images=images[place % 2])
        for place, (row, text, answer) in enumerate(
            zip(rows, TEXTS * 2, ("Red.", "A longer answer.") * 4, strict=False)
        )
    ] + [row for row in rows if not row.images][:2]
    alone = measure_rows(replace(asked, batch_size=1), several, 0)
    passes.clear()
    together = measure_rows(replace(asked, batch_size=8), several, 0)
    assert [count for count, _ in passes[:3]] == [2, 2, 6]  # rows without images, the beginnings of both images, rows
    for name in ("own", "tokens", "surprise", "shuffled", "blank"):
        np.testing.assert_allclose(getattr(together, name), getattr(alone, name), rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(together.states.astype(float), alone.states.astype(float), rtol=2e-3, atol=2e-3)
    assert together.problems == alone.problems == {}


def test_losses_of_captions_right_behind_the_image(asked_often: Any) -> None:
    asked, questions = asked_often
    begin = list(questions[0].input_ids[: shared_end(asked, questions[0].input_ids)])
    rows = [([*begin, 9, 11 + i], [-100] * len(begin) + [9, 11 + i]) for i in range(4)]
    files = [questions[0].image_files] * 4
    given = {"load_pixels": asked.load_pixels, "pad_token_id": asked.tokenizer.pad_token_id}
    alone, together = (
        {each[0]: each[1] for each in answer_losses(asked.model, rows, files, batch_size=size, **given)}
        for size in (1, 4)
    )
    assert together == pytest.approx(alone, rel=1e-5)


def shared_end(asked: Any, ids: Sequence[int]) -> int:
    return len(ids) - list(reversed(ids)).index(asked.model.config.image_token_index)
