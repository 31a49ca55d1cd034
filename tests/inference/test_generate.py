"""Generation: batched answers equal single ones, and no image is encoded twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lora_llava.data.conversation import Conversation
from lora_llava.data.images.image_sources import BadImageError
from lora_llava.data.tokens import Stop
from lora_llava.evaluation.answerers import Evaluator
from lora_llava.inference.answer import Answer
from lora_llava.inference.generate import generate_answers
from lora_llava.inference.question import EncodedImages, Question
from lora_llava.inference.sampling import Sampling


def questions_of(asked: Evaluator, rows: Sequence[Conversation]) -> list[Question]:
    return [Question(asked.prompt(row), row.images) for row in rows]


def answers(asked: Evaluator, questions: Sequence[Question], **settings: Any) -> dict[int, Answer]:
    given = {"batch_size": 5, "sampling": Sampling(max_new_tokens=12), "load_pixels": asked.load_pixels, **settings}
    return dict(generate_answers(asked.model, questions, tokenizer=asked.tokenizer, **{"stop": asked.stop, **given}))


def test_batched_answers_equal_single_ones(speaking: Any) -> None:
    asked, rows = speaking
    questions = questions_of(asked, rows)
    assert len({len(question.input_ids) for question in questions}) > 1
    alone = answers(asked, questions, batch_size=1)
    assert len({answer.text for answer in alone.values()}) == 6
    for batch_size in (3, 5, 12):
        assert answers(asked, questions, batch_size=batch_size) == alone


def test_an_answer_equals_that_of_stock_generation(speaking: Any) -> None:
    asked, rows = speaking
    row = next(row for row in rows if row.images)
    ids = torch.tensor([asked.prompt(row)])
    output = asked.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=asked.load_pixels(row.images),
        do_sample=False,
        max_new_tokens=12,
        pad_token_id=asked.tokenizer.pad_token_id,
    )
    text = asked.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert answers(asked, questions_of(asked, [row]))[0].text == text.strip()


def test_longest_first_and_answered_questions_are_skipped(speaking: Any) -> None:
    asked, rows = speaking
    questions = questions_of(asked, rows)
    given = {
        "stop": asked.stop,
        "tokenizer": asked.tokenizer,
        "load_pixels": asked.load_pixels,
        "sampling": Sampling(max_new_tokens=2),
    }
    order = [i for i, _ in generate_answers(asked.model, questions, batch_size=5, **given)]
    lengths = [len(questions[i].input_ids) for i in order]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(order) == list(range(12))
    left = [i for i, _ in generate_answers(asked.model, questions, batch_size=5, answered={0, 3, 7}, **given)]
    assert sorted(left) == [1, 2, 4, 5, 6, 8, 9, 10, 11]


@pytest.fixture
def seen(speaking: Any) -> Iterator[Counter[float]]:
    """Count how often the tower encodes each image, identified by its sum."""
    counts: Counter[float] = Counter()

    def count(module: Any, args: Any) -> None:
        counts.update(round(float(image.sum()), 3) for image in args[0])

    tower = speaking[0].model.get_base_model().model.vision_tower
    handle = tower.register_forward_pre_hook(count)
    yield counts
    handle.remove()


def test_the_tower_encodes_a_shared_image_once(speaking: Any, seen: Counter[float]) -> None:
    asked, rows = speaking
    with_image = [row for row in rows if row.images][:3]
    shared = [replace(row, images=with_image[0].images) for row in rows if row.images] + with_image[1:]
    apart = answers(asked, questions_of(asked, shared), batch_size=1)
    assert set(seen.values()) == {1}
    assert len(seen) == 3
    seen.clear()
    assert answers(asked, questions_of(asked, shared), batch_size=3) == apart
    assert set(seen.values()) == {1}


def test_an_image_is_freed_after_its_last_question(speaking: Any) -> None:
    asked, rows = speaking
    questions = questions_of(asked, [row for row in rows if row.images])
    encoded = EncodedImages(asked.model, asked.load_pixels, questions, range(len(questions)))
    for i in range(len(questions)):
        encoded.batch([i], questions, asked.tokenizer.pad_token_id)
        encoded.release([i], questions)
        assert not encoded._held
    twice = EncodedImages(asked.model, asked.load_pixels, questions, range(len(questions)), times=2)
    twice.batch([0], questions, asked.tokenizer.pad_token_id)
    twice.release([0], questions)
    assert list(twice._held) == list(questions[0].image_files)


def test_a_missing_image_is_a_problem_of_its_question_only(speaking: Any) -> None:
    asked, rows = speaking
    questions = questions_of(asked, rows)
    gone = next(row for row in rows if row.images).images[0]

    def images(names: Sequence[str]) -> torch.Tensor:
        if gone in names:
            raise BadImageError(f"image {gone} is missing")
        return asked.load_pixels(names)

    complete = answers(asked, questions)
    found = answers(asked, questions, load_pixels=images)
    lost = [i for i, question in enumerate(questions) if gone in question.image_files]
    assert {i for i in found if found[i].problem} == set(lost)
    assert found[lost[0]] == Answer("", problem=f"image {gone} is missing", is_image=True)
    assert {i: answer for i, answer in found.items() if i not in lost} == {
        i: answer for i, answer in complete.items() if i not in lost
    }
    alone = answers(asked, [questions[lost[0]]], load_pixels=images)
    assert [answer.problem for answer in alone.values()] == [f"image {gone} is missing"]


def test_the_model_accepts_pixels_again_afterwards(speaking: Any) -> None:
    asked, rows = speaking
    row = next(row for row in rows if row.images)
    inner = asked.model.get_base_model().model
    before = inner.get_image_features
    answers(asked, questions_of(asked, rows))
    assert inner.get_image_features == before
    stream = generate_answers(
        asked.model,
        questions_of(asked, rows),
        tokenizer=asked.tokenizer,
        load_pixels=asked.load_pixels,
        batch_size=1,
        sampling=Sampling(max_new_tokens=2),
        stop=asked.stop,
    )
    next(stream)
    assert inner.get_image_features(pixel_values=asked.load_pixels(row.images)).pooler_output[0].shape[0] == 4
    stream.close()


def test_sampling_follows_the_seed(speaking: Any) -> None:
    asked, rows = speaking
    questions = questions_of(asked, rows)
    first, again, other = (answers(asked, questions, sampling=Sampling(1.0, 0.9, 12, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first != answers(asked, questions)


def test_resumed_sampling_equals_uninterrupted_sampling(speaking: Any) -> None:
    asked, rows = speaking
    questions = questions_of(asked, rows)

    def draw(answered: dict[int, Any]) -> dict[int, Any]:
        stream = generate_answers(
            asked.model,
            questions,
            tokenizer=asked.tokenizer,
            stop=asked.stop,
            load_pixels=asked.load_pixels,
            batch_size=4,
            sampling=Sampling(5.0, max_new_tokens=6, seed=1),
            answered=answered,
        )
        return dict(stream)

    complete = draw({})
    first = dict(list(complete.items())[:6])  # a batch and a half
    rest = draw(first)
    assert not set(rest) & set(first)
    assert first | rest == complete


def test_text_behind_the_stop_string_is_removed(speaking: Any) -> None:
    asked, rows = speaking
    questions = questions_of(asked, rows)
    complete = answers(asked, questions)
    index, text = next((i, answer.text) for i, answer in complete.items() if len(answer.text) > 8)
    stop = text[4:6]
    cut = answers(asked, questions, stop=Stop([2], stop))
    assert cut[index].text == text.split(stop)[0].strip()
    assert all(stop not in answer.text for answer in cut.values())
