"""Prompts for ScienceQA. Scores of the same weights differ by twenty points between prompts, so each has a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import IMAGE_PLACEHOLDER, Conversation, Turn
from lora_llava.data.scienceqa import LETTERS, format_problem
from lora_llava.data.typed import as_typed

_ANSWER = "The answer is"
"""From LLaVA's converter (scripts/convert_sqa_to_llava.py)."""
PARSER = "lora_llava.evaluation.scienceqa.parse_answer: LLaVA's rule, llava/eval/eval_science_qa.py"
PARSERS = {
    "llava": PARSER,
    "lenient": "lora_llava.evaluation.parsing.lenient_letters.parse_leniently: "
    "also b, (B), **B**, answer: B, and the choice's text",
}
"""Description of each parser of letters, as `evaluation.json` records it."""
LETTER_REQUEST = "Answer with the option's letter from the given choices directly."
"""Used by LLaVA-1.5 (llava/eval/model_vqa_science.py, --single-pred-prompt) and by lmms-eval."""
PROMPTS = {
    "recipe": "as the recipe's data.prompt_order has it, which is how it was trained",
    "direct": "LLaVA-1.5's: CQM-A, then the request for the letter alone (scripts/v1_5/eval/sqa.sh)",
    "lmms-eval": "lmms-eval's default: context, question, options a line each, then the request for the letter "
    "(lmms_eval/tasks/scienceqa/utils.py)",
}
"""Description of each prompt, as `evaluation.json` records it."""


def write_question(problem: Mapping[str, Any], prompt: str) -> str:
    """Write a problem as a question.

    Args:
        problem: A mapping with `question`, `choices`, `hint` and `answer`. The answer stays out of the prompt.
        prompt: `direct` or `lmms-eval`.

    Returns:
        The question without an image placeholder.
    """
    if prompt == "direct":
        return f"{format_problem(problem, 'CQM-A')[0]}\n{LETTER_REQUEST}"
    context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
    options = "\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(problem["choices"]))
    return f"{context}{problem['question']}\n{options}\n{LETTER_REQUEST}"


def with_prompt(row: Conversation, prompt: str) -> Conversation:
    """Rewrite a row of ScienceQA for another prompt.

    Args:
        row: The row as it was read.
        prompt: A key of `PROMPTS`.

    Returns:
        The row; for any prompt except `recipe`, its image comes before the question.
    """
    if prompt == "recipe":
        return row
    question = IMAGE_PLACEHOLDER * len(row.images) + "\n" * bool(row.images)
    question += as_typed(write_question(row.extra, prompt), [IMAGE_PLACEHOLDER])
    return replace(row, turns=(Turn("user", question), Turn("assistant", LETTERS[row.extra["answer"]])))


def reasons_first(prompt: str, order: str) -> bool:
    """Check whether a model trained with this `data.prompt_order` writes its reasons before the letter."""
    return prompt == "recipe" and order == "QCM-LEA"


def choices_of(row: Conversation, reasons: str, *, prompt: str) -> list[str]:
    """Return the answers that likelihood chooses from.

    For ScienceQA this is the answer in the form of the prompt, once for each letter; otherwise the choices in the data.

    Args:
        row: A row of ScienceQA, or one with `choices` in `extra`.
        reasons: The text generated before the answer; "" if none was generated.
        prompt: A key of `PROMPTS`.

    Raises:
        UserError: If the row has no choices, or its answer is not one of them.
    """
    if "num_choices" not in row.extra:
        if "choices" not in row.extra:
            raise UserError(
                f"--method loglik: {row.name} has no choices; add a list `choices`, or a column with the choices "
                "separated by |, or leave --method out"
            )
        choices = list(dict.fromkeys(row.extra["choices"]))
        if row.turns[-1].shown not in choices:
            raise UserError(
                f"--method loglik: the answer of {row.name}, {row.turns[-1].shown!r}, is not one of its choices; "
                "fix the row"
            )
        return choices
    letters = LETTERS[: row.extra["num_choices"]]
    if prompt != "recipe":
        return list(letters)
    before = reasons.rpartition(_ANSWER)[0] if _ANSWER in reasons else reasons
    return [f"{before.strip()} {_ANSWER} {letter}.".strip() for letter in letters]
