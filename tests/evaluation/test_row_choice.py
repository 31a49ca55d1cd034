"""Choice of rows, and shuffled images."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.data import Conversation, Turn
from lora_llava.evaluation.row_evaluation import choose_rows, shuffle_images, write_predictions
from lora_llava.evaluation.scienceqa import Prediction


def rows_with(images: list[bool]) -> list[Conversation]:
    """A row each, with an image of its own or none."""
    return [
        Conversation(str(number), (Turn("user", f"question {number}"),), (f"{number}.png",) if image else ())
        for number, image in enumerate(images)
    ]


@given(count=st.integers(0, 20), seed=st.integers(0, 9))
def test_rows_are_chosen_in_order(count: int, seed: int) -> None:
    rows = rows_with([True] * 12)
    chosen = choose_rows(rows, count, seed)
    assert len(chosen) == min(count, 12)
    assert chosen == [row for row in rows if row in chosen]
    assert choose_rows(rows, count, seed) == chosen


def test_all_and_another_seed() -> None:
    rows = rows_with([True] * 100)
    assert choose_rows(rows, "all", 0) == rows
    assert choose_rows(rows, 50, 0) != choose_rows(rows, 50, 1)


@given(images=st.lists(st.booleans(), max_size=12).filter(lambda given: sum(given) != 1), seed=st.integers(0, 9))
def test_every_image_moves_to_another_row(images: list[bool], seed: int) -> None:
    rows = rows_with(images)
    shuffled = shuffle_images(rows, seed)
    assert [replace(row, images=()) for row in shuffled] == [replace(row, images=()) for row in rows]
    assert Counter(row.images for row in shuffled) == Counter(row.images for row in rows)
    for old, new in zip(rows, shuffled, strict=True):
        assert bool(old.images) == bool(new.images)
        assert not old.images or old.images != new.images


@given(shown=st.lists(st.lists(st.sampled_from("abcd"), max_size=2).map(tuple), max_size=16), seed=st.integers(0, 9))
def test_rows_with_equal_images_get_other_images(shown: list[tuple[str, ...]], seed: int) -> None:
    rows = [Conversation(str(number), (), images) for number, images in enumerate(shown)]
    shuffled = shuffle_images(rows, seed)
    assert [len(row.images) for row in shuffled] == [len(images) for images in shown]
    assert Counter(row.images for row in shuffled) == Counter(shown)
    for old, new in zip(rows, shuffled, strict=True):
        as_many = [images for images in shown if len(images) == len(old.images)]
        most = max(Counter(as_many).values())
        if old.images and 2 * most <= len(as_many):
            assert new.images != old.images


def test_predictions_are_written_one_per_line(tmp_path: Path) -> None:
    item = Prediction(question_id="1", text='"é"\n', prediction=0, answer=1, categories=["NAT"])
    file = tmp_path / "new" / "predictions.jsonl"
    write_predictions(file, [item, item])
    line = '{"question_id": "1", "text": "\\"é\\"\\n", "prediction": 0, "answer": 1, "categories": ["NAT"]}\n'
    assert file.read_text(encoding="utf-8") == line * 2


@pytest.mark.parametrize("count", ["0", "3"])
def test_a_count_may_be_a_text(count: str) -> None:
    assert len(choose_rows(rows_with([True] * 5), count, 0)) == int(count)
