"""Normalisation of answers: numbers by value, other scripts by their own rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.evaluation.answer_metrics import exact_match, rouge_l, token_f1
from lora_llava.evaluation.answers import question_type
from lora_llava.evaluation.parsing.normal import answer_tokens, normalise


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("35.", "35"),
        ("3.0", "3"),
        ("1,000", "1000"),
        ("1,000,000.50", "1000000.5"),
        ("\u221235", "-35"),
        ("+35", "35"),
        ("007", "7"),
        (".5", "0.5"),
        ("1e3", "1000"),
        ("1e-3", "0.001"),
        ("2.5e3", "2500"),
        ("35cm", "35 cm"),
        ("35.0cm", "35 cm"),
        ("35%", "35"),
        ("$1,000", "1000"),
        ("9:30", "09:30"),
        ("2020-01-05", "2020-1-5"),
        ("\u00bd", "1/2"),
        ("1\u00bd", "1 1/2"),
        ("10\u00b2", "10^2"),
        ("10\u207b\u00b3", "10^-3"),
        ("(3)(4)", "3 4"),
        ("-0", "0"),
        ("1'000", "1000"),
        ("1\u2019000", "1000"),
        ("1\u202f000", "1000"),
        ("\u0663\u0665", "35"),
        ("\uff11\uff0c\uff10\uff10\uff10", "1000"),
        ("3;4", "3, 4"),
        ("-3.50\u00b0C", "-3.5 \u00b0C"),
        ("x=3", "x = 3"),
        ("(-35)", "-35"),
        ("3pm", "3 pm"),
        ("F-16", "F16"),
        ("The answer is 3.50.", "answer is 3.5"),
        ("don\u2019t", "don't"),
        ("\u201ccat\u201d", "cat"),
        ("stra\u00dfe", "STRASSE"),
        ("\uff22", "b"),
        ("caf\u00e9", "cafe\u0301"),
        ("well\u2013known", "well-known"),
        ("a\u200bb", "ab"),
        ("\u6771\u4eac\u90fd\u3002", "\u6771\u4eac \u90fd"),
        ("35\u5c81", "35 \u5c81"),
    ],
)
def test_equal_answers(text: str, reference: str) -> None:
    assert answer_tokens(text) == answer_tokens(reference)
    assert exact_match(text, reference)
    assert token_f1(text, reference) == 1.0


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("35", "3.5"),
        ("35", "-35"),
        ("3.5", "-3.5"),
        ("3.5cm", "35cm"),
        ("-35\u00b0", "35\u00b0"),
        ("1:2", "12"),
        ("1:2", "2:1"),
        ("1:2", "1/2"),
        ("3/4", "34"),
        ("2020-01-05", "20200105"),
        ("9:30", "930"),
        ("9:05", "9:5"),
        ("10\u00b2", "102"),
        ("10^2", "102"),
        ("1.000", "1000"),
        ("3,5", "35"),
        ("1,00", "100"),
        ("2+3", "23"),
        ("5-3", "53"),
        ("v1.2", "v12"),
        ("1.2.3", "123"),
        ("1e3", "13"),
        ("1\u00bd", "11/2"),
        ("2*3", "23"),
        ("$3.50", "350"),
        ("A3.5", "A35"),
        ("3.5%", "35%"),
        ("0,5", "05"),
        ("x-3.5", "x-35"),
        ("3.5,4.5", "354.5"),
        ("12,34", "1234"),
        ("-.5", ".5"),
        ("3.5 and 4", "35 and 4"),
    ],
)
def test_different_answers(text: str, reference: str) -> None:
    assert not exact_match(text, reference)
    assert token_f1(text, reference) < 1.0


def test_cjk_is_compared_by_characters() -> None:
    assert token_f1("\u6771\u4eac\u90fd", "\u6771\u4eac") == 0.8
    assert token_f1("\uc11c\uc6b8\uc2dc", "\uc11c\uc6b8") == 0.8
    assert rouge_l("\u6771\u4eac\u90fd", "\u6771\u4eac") == pytest.approx(0.8)
    assert normalise("\u6771\u4eac \u90fd \u306f 35 \u3067\u3059\u3002") == "\u6771\u4eac\u90fd\u306f 35 \u3067\u3059"


@pytest.mark.parametrize(("reference", "kind"), [("-3.5", "number"), ("1,000", "number"), ("3d4", "phrase")])
def test_numbers_are_a_type_of_question(reference: str, kind: str) -> None:
    assert question_type(reference) == kind


def test_an_exponent_that_is_too_large_is_compared_as_written() -> None:
    assert answer_tokens("1e999999999") == ["1e999999999"]
    assert not exact_match("1e999999999", "1e999999998")


@given(whole=st.integers(-(10**9), 10**9), digits=st.integers(0, 6))
def test_numbers_are_compared_by_value(whole: int, digits: int) -> None:
    value = f"{whole / 10**digits:.{digits}f}"
    assert exact_match(value, f"{whole / 10**digits:,.{digits + 2}f}")
    assert exact_match(value, f"{(whole + 1) / 10**digits:.{digits}f}") is False


@given(text=st.text())
def test_normalisation_is_idempotent(text: str) -> None:
    assert answer_tokens(text) == answer_tokens(text)
    assert token_f1(text, text) == 1.0
