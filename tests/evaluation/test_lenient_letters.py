"""The lenient parser of letters: common forms, and no guess for ambiguous answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.commands.main import main
from lora_llava.evaluation.parsing.lenient_letters import parse_leniently
from lora_llava.evaluation.scienceqa import parse_answer

CHOICES = ["iron", "gold", "a cat", "vitamin C"]
NAMED = [
    "b",
    "(B)",
    "B)",
    "**B**",
    "answer: B",
    "B",
    "B.",
    "[B]",
    "The answer is B",
    "the answer is B.",
    "Answer: (B)",
    "gold",
    "Gold.",
    "The answer is gold.",
    "B. gold",
    "B) gold",
    "(B) gold",
    "**B.** gold",
    "b) gold",
    "B: gold",
    "answer: B gold",
    "Answer: B. gold",
    "Option B",
    "The correct option is: B",
    "B because it shines",
    "The answer is B because it shines.",
    "B is correct",
    "Option B is the correct answer.",
    "I choose B.",
    "It's B.",
    "\\boxed{B}",
    '{"answer": "B"}',
    "\uff22",
    "\u201cB\u201d",
    "Iron is heavy. Gold shines.\nAnswer: B",
    "$B$",
    "B. Gold is a metal that shines.",
    "B, because it shines.",
    "The answer is **B**.",
    "Answer = B",
    "answer: b",
    "The answer is B. The answer is B.",
    "The answer is 'gold'.",
    "The answer would be B",
]
UNNAMED = [
    "A cat is shown",
    "A or B",
    "A, B",
    "A and B",
    "The answer is B or C.",
    "The answer is not B.",
    "B is not correct",
    "Option B is wrong",
    "E",
    "(E)",
    "The answer is E.",
    "I think so",
    "",
    "...",
    "A. iron B. gold",
    "A) iron or B) gold",
    "The answer is B. No, the answer is C.",
    "The answer is a metal",
    "B. iron",
    "(A) (B)",
    "AB",
    "Both A and B",
    "answer: A/B",
    "A man",
    "a big dog",
    "Bananas",
    "The answer is Bananas.",
    "Either B or C",
    "The answer isn't B",
    "a.m.",
    "D-day",
    "The answer is B vitamins",
    "I have a b",
    "gold or iron",
    "not gold",
    "None of A, B, C",
    "The answer is either B or C",
    "answer: B, C",
    "A is not the answer. B is not the answer.",
    "Which is it: A or B?",
    "The answer cannot be B.",
    "An image of a cat.",
    "The answer is B: iron",
]


@pytest.mark.parametrize("text", NAMED)
def test_a_choice_is_found_in_common_forms(text: str) -> None:
    assert parse_leniently(text, 4, CHOICES) == 1


@pytest.mark.parametrize("text", UNNAMED)
def test_nothing_is_guessed(text: str) -> None:
    assert parse_leniently(text, 4, CHOICES) == -1


@pytest.mark.parametrize(
    ("text", "choices", "index"),
    [
        ("A cat", CHOICES, 2),
        ("vitamin C", CHOICES, 3),
        ("C", CHOICES, 2),
        ("D. vitamin C", CHOICES, 3),
        ("B. vitamin C", CHOICES, -1),
        ("A", ["B", "A"], -1),
        ("cat", ["a cat", "the cat", "dog"], -1),
        ("The cat", ["a cat", "the cat", "dog"], 1),
        ("35", ["3.5", "35", "-35"], 1),
        (".5", ["5", ".5"], 1),
        ("a", CHOICES, 0),
        ("A cat", [], -1),
        ("e", CHOICES, -1),
    ],
)
def test_a_choice_by_its_own_text(text: str, choices: list[str], index: int) -> None:
    assert parse_leniently(text, len(choices) or 4, choices) == index


@given(text=st.text(), count=st.integers(2, 5))
def test_any_text_names_a_choice_or_none(text: str, count: int) -> None:
    assert parse_leniently(text, count, CHOICES[:count]) in range(-1, count)


@given(letter=st.sampled_from("ABCD"), form=st.sampled_from(["{}", "{}. iron bar", "So. The answer is {}.", "{}. "]))
def test_answers_that_llava_parses_are_parsed_alike(letter: str, form: str) -> None:
    text = form.format(letter)
    assert parse_leniently(text, 4, CHOICES) == parse_answer(text, 4) == "ABCD".index(letter)


def test_score_uses_the_chosen_parser_and_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = {
        "question": "Which is a metal?",
        "choices": ["wood", "gold"],
        "answer": 1,
        "hint": "",
        "image": None,
        "subject": "natural science",
        "grade": "grade3",
    }
    texts = ["B.", "(B)", "gold", "A or B", "The answer is A."]
    names = [str(number) for number in range(len(texts))]
    (tmp_path / "p.json").write_text(json.dumps(dict.fromkeys(names, problem)))
    (tmp_path / "s.json").write_text(json.dumps({"test": names}))
    lines = [json.dumps({"question_id": name, "text": text}) for name, text in zip(names, texts, strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    files = [("--problems", "p.json"), ("--splits", "s.json"), ("--answers", "a.jsonl")]
    argv = ["score", "scienceqa", *(part for flag, name in files for part in (flag, str(tmp_path / name)))]
    found = {}
    for parser in (None, "llava", "lenient"):
        assert main(None, [*argv, "--json", *(["--parser", parser] if parser else [])]) == 0
        found[parser] = json.loads(capsys.readouterr().out)
    assert found[None] == found["llava"]
    assert (found["llava"]["AVG"], found["llava"]["unparsed"]) == ([0.0, 0, 5], 4)
    assert (found["lenient"]["AVG"], found["lenient"]["unparsed"]) == ([60.0, 3, 5], 1)
    assert "parser" not in found["llava"]
    assert found["lenient"]["parser"] == "lenient"
    assert main(None, [*argv, "--parser", "lenient"]) == 0
    assert "lenient" in capsys.readouterr().out
