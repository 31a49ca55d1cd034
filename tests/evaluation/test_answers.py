"""Marks for free answers: exact match and token F1, by hand."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.evaluation.answers import (
    answer_table,
    exact_match,
    is_answer_table,
    mark_answer,
    normalise,
    token_f1,
)

WORDS = st.lists(st.sampled_from(["a", "the", "red", "cube", "Red", "two", ".", "cube's", " ", "\n"]), max_size=8)
TEXTS = WORDS.map(" ".join)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The red cube.", "red cube"), ("  a\tRED \n cube ", "red cube"), ("an apple, the theme", "apple theme"),
        ("It's 3.5!", "its 35"), ("A", "a"), ("the", "the"), ("...", ""), ("", ""), ("Ein Würfel", "ein würfel"),
        ("a-b", "ab"), ("x-the-y", "xthey"), ("(the) cat", "cat"),
    ],
)  # fmt: skip
def test_a_text_without_articles_marks_and_capitals(text: str, wanted: str) -> None:
    assert normalise(text) == wanted


@pytest.mark.parametrize(
    ("text", "reference", "exact", "f1"),
    [
        ("red cube", "The red cube.", True, 1.0),
        ("a cube", "The red cube.", False, 2 / 3),  # one of one and one of two
        ("red red cube", "red cube cube", False, 2 / 3),  # each word as often as both have it
        ("the big red cube lies here", "red cube", False, 4 / 7),  # two of five and two of two
        ("sphere", "red cube", False, 0.0),
        ("cube red", "red cube", False, 1.0),
        ("", "", True, 1.0),
        ("the", "A.", False, 0.0),
        ("", "A", False, 0.0),
        ("a.", "A", True, 1.0),
        ("", "cube", False, 0.0),
        ("cube", "the", False, 0.0),
    ],
)
def test_marks_by_hand(text: str, reference: str, exact: bool, f1: float) -> None:
    assert exact_match(text, reference) is exact
    assert token_f1(text, reference) == f1
    assert token_f1(reference, text) == f1


@given(text=TEXTS, reference=TEXTS)
def test_marks_agree_with_each_other(text: str, reference: str) -> None:
    assert 0.0 <= token_f1(text, reference) <= 1.0
    assert token_f1(text, text) == 1.0
    assert not exact_match(text, reference) or token_f1(text, reference) == 1.0
    assert normalise(normalise(text)) == normalise(text)
    assert not set(normalise(text)) & {*string.punctuation, *string.ascii_uppercase}


def test_a_marked_answer() -> None:
    assert mark_answer("7", "mine", "What?", "The red cube.", "a cube") == {
        "question_id": "7", "source": "mine", "question": "What?", "reference": "The red cube.", "text": "a cube",
        "exact": False, "f1": 2 / 3,
    }  # fmt: skip


def marked(source: str, *texts: str) -> list[Any]:
    return [mark_answer(str(n), source, "What?", "red cube", text) for n, text in enumerate(texts)]


def test_marks_are_averaged_over_all_and_every_source() -> None:
    rows = [*marked("b", "red cube", "cube", "x"), *marked("a", "cube")]
    table = answer_table(iter(rows))
    assert table == {"all": [25.0, 58.33, 4], "b": [33.33, 55.56, 3], "a": [0.0, 66.67, 1]}
    assert list(table) == ["all", "b", "a"]


def test_one_source_is_all() -> None:
    assert answer_table(marked("a", "red cube", "cube")) == {"all": [50.0, 83.33, 2]}
    assert answer_table([]) == {"all": [0.0, 0.0, 0]}


def test_a_source_may_be_called_all() -> None:
    assert answer_table(marked("all", "red cube"))["all"] == [100.0, 100.0, 1]


def test_tables_of_free_answers_are_told_from_science_qa_s() -> None:
    assert is_answer_table(answer_table([]))
    for other in (None, {}, {"NAT": [1.0, 2.0]}):
        assert not is_answer_table(other)
