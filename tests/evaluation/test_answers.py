"""Scores of free answers: exact match and token F1, computed by hand."""

from __future__ import annotations

import re
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from lora_llava.evaluation.answer_metrics import exact_match, rouge_l, token_f1
from lora_llava.evaluation.answers import answer_table, is_answer_table, question_type, score_answer
from lora_llava.evaluation.parsing.normal import normalise

WORDS = st.lists(st.sampled_from(["a", "the", "red", "cube", "Red", "two", ".", "cube's", " ", "\n"]), max_size=8)
TEXTS = WORDS.map(" ".join)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The red cube.", "red cube"),
        ("  a\tRED \n cube ", "red cube"),
        ("an apple, the theme", "apple theme"),
        ("It's 3.5!", "its 3.5"),
        ("A", "a"),
        ("the", "the"),
        ("...", ""),
        ("", ""),
        ("Ein Würfel", "ein würfel"),
        ("a-b", "ab"),
        ("x-the-y", "xthey"),
        ("(the) cat", "cat"),
    ],
)
def test_a_text_without_articles_punctuation_and_capitals(text: str, wanted: str) -> None:
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
def test_scores_by_hand(text: str, reference: str, exact: bool, f1: float) -> None:
    assert exact_match(text, reference) is exact
    assert token_f1(text, reference) == f1
    assert token_f1(reference, text) == f1


@given(text=TEXTS, reference=TEXTS)
def test_scores_agree_with_each_other(text: str, reference: str) -> None:
    assert 0.0 <= token_f1(text, reference) <= 1.0
    assert token_f1(text, text) == 1.0
    assert not exact_match(text, reference) or token_f1(text, reference) == 1.0
    assert normalise(normalise(text)) == normalise(text)
    assert not set(normalise(text)) & {*string.punctuation, *string.ascii_uppercase}


def test_a_scored_answer() -> None:
    assert score_answer("7", "mine", "What?", "The red cube.", "a cube") == {
        "question_id": "7",
        "source": "mine",
        "type": "phrase",
        "question": "What?",
        "reference": "The red cube.",
        "text": "a cube",
        "exact": False,
        "f1": 2 / 3,
        "rouge_l": pytest.approx(0.4),
    }
    assert score_answer("7", "mine", "What?", "3", "3", "counting")["type"] == "counting"


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat", "the cat sat on", 2 * 1.0 * 0.5 / 1.5),
        ("sat cat", "cat sat", 0.5),  # one word in order
        ("кот сидит", "кот сидит", 1.0),  # rouge_score's own words are a to z
        ("", "cat", 0.0),
        ("!", "?", 0.0),
    ],
)
def test_rouge_l(text: str, reference: str, expected: float) -> None:
    assert rouge_l(text, reference) == pytest.approx(expected)


@given(text=TEXTS, reference=TEXTS)
def test_rouge_l_equals_rouge_score_on_plain_letters(text: str, reference: str) -> None:
    plain = [re.sub(r"[^a-z0-9 ]", " ", t.lower()) for t in (text, reference)]
    own = RougeScorer(["rougeL"]).score(plain[1], plain[0])["rougeL"].fmeasure
    assert rouge_l(*plain) == own


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("Yes.", "yes/no"),
        ("no", "yes/no"),
        ("No, it is red", "phrase"),
        ("two", "number"),
        ("12", "number"),
        ("3.", "number"),
        ("twenty two", "phrase"),
        ("a red cube on the left", "phrase"),
        ("a red cube lies on the left of it", "text"),
        ("", "phrase"),
    ],
)
def test_types_of_question(reference: str, kind: str) -> None:
    assert question_type(reference) == kind


def scored(source: str, *texts: str) -> list[Any]:
    return [score_answer(str(n), source, "What?", "red cube", text) for n, text in enumerate(texts)]


def scores(exact: float, f1: float, rouge: float, count: int, loss: float | None = None) -> dict[str, Any]:
    return {"exact_match": exact, "f1": f1, "rouge_l": rouge, "loss": loss, "questions": count}


def test_scores_are_averaged_over_all_rows_and_each_source() -> None:
    rows = [*scored("b", "red cube", "cube", "x"), *scored("a", "cube")]
    table = answer_table(iter(rows))
    assert table == {
        "all": scores(25.0, 58.33, 58.33, 4),
        "b": scores(33.33, 55.56, 55.56, 3),
        "a": scores(0.0, 66.67, 66.67, 1),
    }
    assert list(table) == ["all", "b", "a"]


def test_one_source_has_no_group_of_its_own() -> None:
    assert answer_table(scored("a", "red cube", "cube")) == {"all": scores(50.0, 83.33, 83.33, 2)}
    assert answer_table([]) == {"all": scores(0.0, 0.0, 0.0, 0)}


def test_each_of_several_types_is_a_group() -> None:
    rows = [
        score_answer("1", "a", "How many?", "two", "two"),
        score_answer("2", "a", "Is it?", "yes", "no"),
        score_answer("3", "a", "What?", "red", "red", "colour"),
    ]
    table = answer_table(rows)
    assert list(table) == ["all", "type: yes/no", "type: number", "type: colour"]
    assert [group["exact_match"] for group in table.values()] == [66.67, 0.0, 100.0, 100.0]


def test_the_loss_is_a_mean_over_tokens_if_every_row_has_it() -> None:
    rows = scored("a", "red cube", "cube")
    rows[0] |= {"loss": 1.0, "loss_tokens": 3}
    assert answer_table(rows)["all"]["loss"] is None
    rows[1] |= {"loss": 3.0, "loss_tokens": 1}
    assert answer_table(rows)["all"]["loss"] == 1.5


def test_a_source_may_be_called_all() -> None:
    table = answer_table([*scored("all", "red cube"), *scored("type: number", "x")])
    assert list(table) == ["all", "all (source)", "type: number (source)"]
    assert [group["questions"] for group in table.values()] == [2, 1, 1]


def test_tables_of_free_answers_are_recognised() -> None:
    assert is_answer_table(answer_table([]))
    for other in (None, {}, {"NAT": [1.0, 2.0]}):
        assert not is_answer_table(other)
