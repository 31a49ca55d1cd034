"""Prompts of ScienceQA, word for word."""

from __future__ import annotations

from typing import Any

import pytest

from lora_llava.core.errors import UserError
from lora_llava.data import Conversation, Turn
from lora_llava.evaluation.question_prompts import PROMPTS, choices_of, reasons_first, with_prompt, write_question

PROBLEM: dict[str, Any] = {
    "question": "Which one is iron?",
    "choices": ["gold", "iron", "a nail"],
    "hint": "It rusts.",
    "answer": 1,
    "num_choices": 3,
}


def row(**changes: Any) -> Conversation:
    turns = (Turn("user", "<image>\nas the recipe has it"), Turn("assistant", "It rusts. The answer is B."))
    return Conversation("7", turns, ("7.png",), PROBLEM | changes)


def test_the_direct_prompt_is_llava_1_5_s() -> None:
    assert write_question(PROBLEM, "direct") == (
        "Context: It rusts.\nQuestion: Which one is iron?\nOptions: (A) gold (B) iron (C) a nail\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert write_question(PROBLEM | {"hint": ""}, "direct").startswith("Context: N/A\nQuestion: ")


def test_the_lmms_eval_prompt() -> None:
    assert write_question(PROBLEM, "lmms-eval") == (
        "Context: It rusts.\nWhich one is iron?\nA. gold\nB. iron\nC. a nail\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert write_question(PROBLEM | {"hint": ""}, "lmms-eval").startswith("Which one is iron?\nA. gold")


def test_another_prompt_keeps_the_image_and_hides_the_answer() -> None:
    assert with_prompt(row(), "recipe") == row()
    for prompt in ("direct", "lmms-eval"):
        asked = with_prompt(row(), prompt)
        assert asked.turns[0].text == f"<image>\n{write_question(PROBLEM, prompt)}"
        assert asked.turns[1].text == "B"
        assert asked.images == ("7.png",)
        other = with_prompt(row(answer=2), prompt)
        assert other.turns[0] == asked.turns[0]
    without = Conversation("7", row().turns, (), PROBLEM)
    assert with_prompt(without, "direct").turns[0].text == write_question(PROBLEM, "direct")


def test_likelihood_chooses_among_letters() -> None:
    assert choices_of(row(), "", prompt="direct") == ["A", "B", "C"]
    assert choices_of(row(), "", prompt="recipe") == ["The answer is A.", "The answer is B.", "The answer is C."]


@pytest.mark.parametrize(
    "reasons",
    ["It rusts. The answer is C.", "It rusts.", "It rusts. The answer is", "It rusts. The answer is (B)"],
)
def test_the_conclusion_of_generated_reasons_is_cut(reasons: str) -> None:
    assert choices_of(row(), reasons, prompt="recipe") == [f"It rusts. The answer is {letter}." for letter in "ABC"]


def test_only_the_last_conclusion_is_cut() -> None:
    reasons = "The answer is a metal. It rusts. The answer is B."
    assert choices_of(row(), reasons, prompt="recipe")[0] == "The answer is a metal. It rusts. The answer is A."


def test_reasons_come_first_only_for_qcm_lea() -> None:
    assert reasons_first("recipe", "QCM-LEA")
    assert not any(reasons_first("recipe", order) for order in ("QCM-ALE", "CQM-A"))
    assert not any(reasons_first(prompt, "QCM-LEA") for prompt in PROMPTS if prompt != "recipe")


def test_rows_with_their_own_choices() -> None:
    turns = (Turn("user", "What?"), Turn("assistant", "red"))
    own = Conversation("9", turns, (), {"choices": ["red", "blue", "red"]})
    assert choices_of(own, "", prompt="recipe") == ["red", "blue"]
    with pytest.raises(UserError, match="row 9 has no choices; add a list `choices`"):
        choices_of(Conversation("9", turns), "", prompt="recipe")
