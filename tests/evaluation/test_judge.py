"""Prompts of the judge, and the scores in its replies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.core.errors import UserError
from lora_llava.evaluation.judge.review import (
    CATEGORIES,
    ORDERS,
    JudgeCase,
    JudgeSettings,
    judge_request,
    load_prompts,
    parse_scores,
    prompt_hashes,
)

REVIEWS = Path(__file__).resolve().parents[3] / "shared" / "data" / "judge_reviews" / "reviews.jsonl"
WHY = "Assistant 2 gave 3 examples and was born in 1999, so it gets 2 points more than the other.\nIt is 90% right."

READ = {
    "8 9": (8, 9),
    "8 9\n" + WHY: (8, 9),
    "\n\n  7   10  \n\n" + WHY: (7, 10),
    "8.5 9\nBoth are good.": (8.5, 9),
    "8, 9\n" + WHY: (8, 9),
    "8,9": (8, 9),
    "9; 7.5": (9, 7.5),
    "8/10 9/10\n" + WHY: (8, 9),
    "Score: 10/10 and 9/10": (10, 9),
    "8 out of 10, 9 out of 10": (8, 9),
    "(8, 9)": (8, 9),
    "**8 9**\n\n**Explanation:** " + WHY: (8, 9),
    "`6 5`": (6, 5),
    "```\n6 5\n```\n" + WHY: (6, 5),
    "### Scores\n6 5\n" + WHY: (6, 5),
    "Scores: 6 5\n" + WHY: (6, 5),
    "The scores are 6 and 5.\n" + WHY: (6, 5),
    "Scores for Assistant 1 and Assistant 2: 6, 5": (6, 5),
    "0 9\nAssistant 1 did not answer.": (0, 9),
    "10 10\r\n" + WHY: (10, 10),
    WHY + "\n\n8 9": (8, 9),
    WHY + "\n\nOutput: (1, 7)": (1, 7),
    WHY + "\nFinal scores:\nAssistant 1: 8\nAssistant 2: 9\n": (8, 9),
    "Assistant 1: 8\nAssistant 2: 9\n" + WHY: (8, 9),
    "Assistant 1: 8/10 (clear)\nAssistant 2: 9/10 (clearer, 4 examples)\n" + WHY: (8, 9),
    "- **Assistant 1:** 8\n- **Assistant 2:** 9.5": (8, 9.5),
    "1. Answer A: 3\n2. Answer B: 4": (3, 4),
    "Assistant 2: 9\nAssistant 1: 8": (8, 9),
    "Assistant 1: 8, Assistant 2: 9.": (8, 9),
    "Assistant 1's score: 8; Assistant 2's score: 9": (8, 9),
    "Response 1 - 8\nResponse 2 - 9": (8, 9),
    "Score for answer 1: 4\n\nScore for answer 2: 6\n" + WHY: (4, 6),
    "8 9\nIn detail:\nAssistant 1: 8\nAssistant 2: 9": (8, 9),
    "<think>\nFirst 5 6? No.\n7 7\n</think>\n\n8 9\n" + WHY: (8, 9),
}
UNREAD = [
    "",
    "   \n\n",
    WHY,
    "8",
    "8/10",
    "10/10",
    "7 out of 10",
    "8/9",
    "8 9 10",
    "8 / 9",
    "8-9",
    "8 - 9",
    "8:9",
    "8,5 9",
    "-8 9",
    "8 -9",
    "11 9",
    "8 10.5",
    "80 90",
    "80/100 90/100",
    "8/5 4/5",
    "2023 2024",
    "08 09",
    "1e1 9",
    "NaN NaN\n" + WHY,
    "nan 9",
    "inf 9",
    "\uff18 \uff19",  # full-width digits
    "\u0668 \u0669",  # Arabic-Indic digits
    "8\u00b2 9",
    "eight nine",
    "8 9 Both assistants did well.",
    "Assistant 2 gave 3 examples.",
    "I would give Assistant 1 an 8 and Assistant 2 a 9.",
    "Assistant 1 receives an 8, and Assistant 2 receives a 9.",
    "Assistant 1: 8",
    "Assistant 1: 8\nAssistant 1: 9",
    "Assistant 1: 8-9\nAssistant 2: 9-10",
    "8 9\n" + WHY + "\nFinal scores: 7 9",
    "8 9\n7 7\n9 9",
    "8 9\nAssistant 1: 7 (as its detail is poor)\nIt is short.\nAssistant 2: 9",
    "Helpfulness:\nAssistant 1: 8\nAssistant 2: 9\nAccuracy:\nAssistant 1: 7\nAssistant 2: 9",
    "Both are fine. Accuracy:\nAssistant 1: 7\nAssistant 2: 9",
    WHY + "\nScores:\nAssistant 1: 10\nAssistant 2: 4\n\nAssistant 1 performed better.",
    "In the image there are\n3 4\napples and pears, and both see it.",
    "<think>8 9</think>",
    "1.\n2.",
]


@pytest.mark.parametrize(("text", "scores"), READ.items())
def test_scores_are_parsed(text: str, scores: tuple[float, float]) -> None:
    assert parse_scores(text) == scores


@pytest.mark.parametrize("text", UNREAD)
def test_ambiguous_scores_are_not_parsed(text: str) -> None:
    assert parse_scores(text) is None


def test_published_reviews_are_parsed_as_recorded_or_not_at_all() -> None:
    if not REVIEWS.is_file():
        pytest.skip("the published reviews are not here")
    rows = [json.loads(line) for line in REVIEWS.read_text(encoding="utf-8").splitlines()]
    found = [(parse_scores(row["text"]), tuple(row["score"])) for row in rows]
    assert [pair for pair in found if pair[0] not in (None, pair[1])] == []
    unread = [row["question_id"] for row, (scores, _) in zip(rows, found, strict=True) if scores is None]
    assert unread == [69, 70, 70]  # of 38: in the middle of the text, and in two not what was recorded


score = st.one_of(st.integers(0, 10).map(str), st.decimals(0, 10, places=1).map(str))
prose = st.lists(st.text(st.characters(exclude_categories=["Nd", "Cs"], exclude_characters="<")), max_size=4)
FORMS = [
    "{} {}",
    "{}, {}",
    "{}/10 {}/10",
    "({}, {})",
    "**{} {}**",
    "Scores: {} and {}",
    "Assistant 1: {}, Assistant 2: {}",
    "Assistant 1: {}\nAssistant 2: {} (good)",
    "Answer A = {}\nAnswer B = {}",
]


@given(st.text())
def test_any_text_is_accepted(text: str) -> None:
    parse_scores(text)


@given(st.lists(st.sampled_from([*"0123456789 ,./:()|-\n", "10", "Assistant ", "Score", " and "])).map("".join))
def test_parsed_scores_appear_in_the_text(text: str) -> None:
    scores = parse_scores(text)
    if scores is not None:
        assert all(0 <= value <= 10 and (f"{value:g}" in text) for value in scores)


@given(score, score, st.sampled_from(FORMS), prose, st.booleans())
def test_a_planted_pair_is_found_at_either_end(
    first: str, second: str, form: str, rest: list[str], at_end: bool
) -> None:
    lines = [line.replace(":", "") for line in rest]  # a title would say what the scores are of
    pair = form.format(first, second)
    text = "\n".join([*lines, pair] if at_end else [pair, *lines])
    assert parse_scores(text) == (float(first), float(second))


def test_a_long_line_takes_no_longer_than_its_length() -> None:
    assert parse_scores("8 " * 200_000 + "\n8 9") == (8, 9)
    assert parse_scores("(" * 100_000 + "assistant 1: " * 100_000) is None


CASE = JudgeCase("7", "detail", "Describe it.", "- a {question}", "a dog {answer_2}", "a cat $x {} \\1")


def test_the_judge_s_prompt() -> None:
    prompts = load_prompts()
    system, user = (message["content"] for message in judge_request(CASE, ORDERS[0], prompts, JudgeSettings()).messages)
    assert system == prompts["system"]
    for part in (
        "<material>\n- a {question}\n</material>",
        "<question>\nDescribe it.\n</question>",
        "<answer_1>\na dog {answer_2}\n</answer_1>",
        "<answer_2>\na cat $x {} \\1\n</answer_2>",
    ):
        assert part in user
    swapped = judge_request(CASE, ORDERS[1], prompts, JudgeSettings()).messages[1]["content"]
    assert "<answer_1>\na cat $x {} \\1\n</answer_1>" in swapped
    assert "<answer_2>\na dog {answer_2}\n</answer_2>" in swapped


def test_later_attempts_have_a_reminder_and_the_last_a_temperature() -> None:
    prompts = load_prompts()
    asked = [judge_request(CASE, ORDERS[0], prompts, JudgeSettings(), attempt) for attempt in range(3)]
    texts = [request.messages[1]["content"] for request in asked]
    assert [request.temperature for request in asked] == [0.0, 0.0, 0.3]
    assert [text.removeprefix(texts[0]) for text in texts] == ["", *[f"\n\n{prompts['reminder']}"] * 2]
    assert judge_request(CASE, ORDERS[0], prompts, JudgeSettings(temperature=None), 2).temperature is None
    assert judge_request(CASE, ORDERS[0], prompts, JudgeSettings(temperature=0.9), 2).temperature == 0.9


def test_shipped_prompts() -> None:
    prompts = load_prompts()
    assert list(prompts) == ["system", *CATEGORIES, "reminder"]
    assert len(set(prompts.values())) == 5
    for category in CATEGORIES:
        for word in ("helpfulness", "relevance", "accuracy", "detail", "from 1", "to 10", "first line"):
            assert word in prompts[category]
    assert prompt_hashes({"a": "x"}) == {"a": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}


def test_own_prompts(tmp_path: Path) -> None:
    shipped = load_prompts()
    for name, text in shipped.items():
        (tmp_path / f"{name}.txt").write_text(f"{text}\n", encoding="utf-8-sig")
    assert load_prompts(tmp_path) == shipped
    (tmp_path / "system.txt").write_text("Mark.")
    assert load_prompts(tmp_path) == shipped | {"system": "Mark."}
    (tmp_path / "conv.txt").write_text("{context} {question} {answer_1}")
    with pytest.raises(UserError, match=r"conv.txt lacks \{answer_2\}; insert the placeholder"):
        load_prompts(tmp_path)
    (tmp_path / "conv.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"conv.txt is not UTF-8"):
        load_prompts(tmp_path)
    (tmp_path / "conv.txt").unlink()
    with pytest.raises(UserError, match=r"conv.txt is missing; copy it from .*conv.txt"):
        load_prompts(tmp_path)
