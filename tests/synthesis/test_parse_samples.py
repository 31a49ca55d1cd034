"""Parsing answers: every accepted form of a sample, and the rejection of those that cannot be read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.data.conversation import Turn
from lora_llava.synthesis.gates.gates import REASONS
from lora_llava.synthesis.parse import CutTurns, parse_sample
from lora_llava.synthesis.sample import FLAVOURS, Flavour, Rejection, Turns

FIRST = {"question": "What is it?", "answer": "A dog."}
SECOND = {"question": "Where is it?", "answer": 'On the "lawn".'}
TWO: Turns = (
    Turn("user", "What is it?"),
    Turn("assistant", "A dog."),
    Turn("user", "Where is it?"),
    Turn("assistant", 'On the "lawn".'),
)
ROLES = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": 'On the "lawn".'},
]
JSON = json.dumps({"turns": [FIRST, SECOND]})
QUOTED = json.dumps(SECOND["answer"])
LLAVA = 'Question:\nWhat is it?\n===\nAnswer:\nA dog.\n===\nQuestion:\nWhere is it?\n===\nAnswer:\nOn the "lawn".\n==='
CONVERSATIONS = {
    "as requested": JSON,
    "over lines": json.dumps({"turns": [FIRST, SECOND]}, indent=2).replace("\n", "\r\n"),
    "in fences": f"```json\n{JSON}\n```",
    "with prose around it": f"Here is a conversation about it:\n\n{JSON}\n\nI hope this helps!",
    "after thoughts": f'<think>Is it {{"turns": []}}?\n\nNo.</think>\n\n{JSON}',
    "after thoughts that the prompt opened": f"Perhaps {json.dumps(FIRST)}?\n</think>\n{JSON}",
    "a bare list": json.dumps([FIRST, SECOND]),
    "a list under another name": json.dumps({"id": 7, "conversation": [FIRST, SECOND]}),
    "nested": json.dumps({"result": {"turns": [FIRST, SECOND]}}),
    "one object after the other": f"{json.dumps(FIRST)}\n{json.dumps(SECOND)}",
    "user and assistant": json.dumps([{"user": p["question"], "assistant": p["answer"]} for p in (FIRST, SECOND)]),
    "human and gpt": json.dumps([{"human": p["question"], "gpt": p["answer"]} for p in (FIRST, SECOND)]),
    "q and a, the answer first": json.dumps([{"A": p["answer"], "Q": p["question"]} for p in (FIRST, SECOND)]),
    "numbered keys": json.dumps(
        {"question_1": "What is it?", "answer_1": "A dog.", "question_2": "Where is it?", "answer_2": SECOND["answer"]}
    ),
    "the same keys again": '{"question": "What is it?", "answer": "A dog.", '
    f'"question": "Where is it?", "answer": {QUOTED}}}',
    "lists of both": json.dumps(
        {"questions": ["What is it?", "Where is it?"], "answers": ["A dog.", SECOND["answer"]]}
    ),
    "pairs": json.dumps([["What is it?", "A dog."], ["Where is it?", SECOND["answer"]]]),
    "roles": json.dumps({"messages": ROLES}),
    "from and value": json.dumps(
        [{"from": "human" if place % 2 == 0 else "gpt", "value": turn.text} for place, turn in enumerate(TWO)]
    ),
    "a comma too many": JSON.replace("]}", ",]}").replace('dog."}', 'dog.",}'),
    "line breaks in a string": JSON.replace("A dog.", "A dog.\n"),
    "LLaVA's form": LLAVA,
    "LLaVA's form, on one line each": "Question: What is it?\nAnswer: A dog.\n\n"
    'Question: Where is it?\nAnswer: On the "lawn".',
    "LLaVA's form, on one line": 'Question: What is it? Answer: A dog. Question: Where is it? Answer: On the "lawn".',
    "numbered lines": '**Q1:** What is it?\n**A1:** A dog.\n\n**Q2:** Where is it?\n**A2:** On the "lawn".',
    "headings": "### Question 1: What is it?\n### Answer 1: A dog.\n"
    '### Question 2: Where is it?\n### Answer 2: On the "lawn".',
    "speakers": "Sure, here it is.\n\nUser: What is it?\nAssistant: A dog.\n"
    'User: Where is it?\nAssistant: On the "lawn".',
}

TEXT = "A dog lies on the lawn.\n\nIt is asleep."
DESCRIPTIONS = {
    "as requested": json.dumps({"description": TEXT}),
    "in fences": f"```\n{json.dumps({'description': TEXT}, indent=1)}\n```",
    "under another name": json.dumps({"Detailed Description": TEXT}),
    "under any one name": json.dumps({"image": TEXT}),
    "in a list": json.dumps([{"description": TEXT}]),
    "in paragraphs": json.dumps({"description": ["A dog lies on the lawn.\n", "\nIt is asleep."]}).replace("\\n", ""),
    "as an answer": json.dumps({"question": "Describe it.", "answer": TEXT}),
    "as a turn": json.dumps({"turns": [{"question": "Describe it.", "answer": TEXT}]}),
    "prose": TEXT,
    "prose with other line ends": TEXT.replace("\n", "\r\n"),
    "prose after a word about it": f"Here is a detailed description of the image:\n\n{TEXT}",
    "prose after a heading": f"**Description:** {TEXT}",
    "prose in fences": f"```text\n{TEXT}\n```",
    "LLaVA's form": f"Question:\nDescribe it.\n===\nAnswer:\n{TEXT}\n===",
    "after an answer's name": f"Answer: {TEXT}",
}
LONG = "A dog lies on the lawn in front of a house and looks at a"

UNREADABLE = [
    (
        "conversation",
        "I had rather not.",
        "unreadable",
        "it is neither JSON nor questions and answers: 'I had rather not.'",
    ),
    ("reasoning", "{}", "unreadable", "the JSON contains no questions and answers"),
    ("reasoning", '{"turns": []}', "unreadable", "the JSON contains no questions and answers"),
    ("reasoning", '{"question": null, "answer": "A dog."}', "unreadable", "the JSON contains no questions and answers"),
    (
        "reasoning",
        '{"question": "Why?", "answer": {"a": 1}}',
        "unreadable",
        "the JSON contains no questions and answers",
    ),
    (
        "reasoning",
        '{"question": "Why?" "answer": "So."}',
        "unreadable",
        "the JSON is invalid: Expecting ',' delimiter: line 1 column 21 (char 20)",
    ),
    ("detail", '{"width": 640, "height": 480}', "unreadable", "it contains no description, or several"),
    ("detail", LLAVA, "unreadable", "it contains no description, or several"),
    ("conversation", "", "empty", "the answer is empty"),
    ("detail", " \n\t", "empty", "the answer is empty"),
    (
        "conversation",
        json.dumps({"turns": [FIRST]})[:-1],
        "cut off",
        """the JSON ends with '{"turns": [{"question": "What is it?", "answer": "A dog."}]'""",
    ),
    (
        "conversation",
        JSON[:50],
        "cut off",
        """the JSON ends with '{"turns": [{"question": "What is it?", "answer": "'""",
    ),
    ("conversation", "{", "cut off", "the JSON ends with '{'"),
    ("conversation", '```json\n{"tur', "cut off", """the JSON ends with '```json {"tur'"""),
    ("conversation", "<think>Let me see", "cut off", "it ends within its thoughts"),
    ("conversation", "Question: What is it?\nAnswer: A dog.\nQuestion: Where is", "cut off", "it ends with 'Where is'"),
    (
        "conversation",
        f"Question: What is it?\nAnswer: {LONG}",
        "cut off",
        "it ends with 'A dog lies on the lawn in front of a house and looks at a'",
    ),
    ("detail", LONG, "cut off", "it ends with 'A dog lies on the lawn in front of a house and looks at a'"),
    (
        "conversation",
        json.dumps([FIRST, {"answer": "No."}]),
        "turn order",
        "turn 3 is from the assistant; expected the user",
    ),
    ("conversation", json.dumps([FIRST, {"question": "No?"}]), "turn order", "the last question has no answer"),
    ("conversation", json.dumps(ROLES[1:]), "turn order", "turn 1 is from the assistant; expected the user"),
    ("conversation", json.dumps([ROLES[0], *ROLES]), "turn order", "turn 2 is from the user; expected the assistant"),
    (
        "conversation",
        "Answer: A dog.\nQuestion: What is it?\nAnswer: A dog.",
        "turn order",
        "turn 1 is from the assistant; expected the user",
    ),
]


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_conversations_are_read_in_every_form(form: str) -> None:
    assert parse_sample(CONVERSATIONS[form], "conversation") == TWO


@pytest.mark.parametrize("form", DESCRIPTIONS)
def test_a_description_answers_the_request(form: str) -> None:
    read = parse_sample(DESCRIPTIONS[form], "detail", "Describe this.")
    assert not isinstance(read, Rejection), read
    assert [(turn.role, turn.text.replace("\n\n", "\n")) for turn in read] == [
        ("user", "Describe this."),
        ("assistant", TEXT.replace("\n\n", "\n")),
    ]


def test_reasoning_is_one_question_and_answer() -> None:
    assert parse_sample(json.dumps(FIRST), "reasoning") == TWO[:2]
    assert parse_sample("Question: What is it?\n===\nAnswer: A dog.", "reasoning") == TWO[:2]
    steps = json.dumps({"question": "How many?", "answer": ["There are two.", "One more comes.", "So three."]})
    assert parse_sample(steps, "reasoning") == (
        Turn("user", "How many?"),
        Turn("assistant", "There are two.\nOne more comes.\nSo three."),
    )
    assert parse_sample('{"question": "How many?", "answer": 2}', "reasoning") == (
        Turn("user", "How many?"),
        Turn("assistant", "2"),
    )


@pytest.mark.parametrize(("flavour", "text", "reason", "detail"), UNREADABLE)
def test_unreadable_answers_are_rejected(flavour: Flavour, text: str, reason: str, detail: str) -> None:
    assert parse_sample(text, flavour, "Describe it.") == Rejection(reason, detail)


def test_thoughts_within_json_are_left_to_the_gates() -> None:
    read = parse_sample('{"question": "Why?", "answer": "<think>So?</think> So."}', "reasoning")
    assert read == (Turn("user", "Why?"), Turn("assistant", "<think>So?</think> So."))


def test_the_first_line_of_a_description_is_kept() -> None:
    text = "The image shows two things:\na dog and a lawn."
    assert parse_sample(text, "detail", "?") == (Turn("user", "?"), Turn("assistant", text))


@pytest.mark.parametrize("opening", ["[", '{"a":', "[{", '{"turns": [['])
def test_deep_nesting_raises_nothing(opening: str) -> None:
    for flavour in FLAVOURS:
        assert parse_sample(opening * 20_000, flavour, "?") == Rejection(
            "cut off", f"the JSON ends with {' '.join((opening * 20_000)[-60:].split())!r}"
        )
    deep = parse_sample("[" * 20_000 + "]" * 20_000, "conversation")
    assert isinstance(deep, Rejection)
    assert deep.reason == "unreadable"


MARKS = "question answer turns role content description Question: Answer: === <think> </think> ``` : 1 null text a b."
PIECES = st.sampled_from([*MARKS.split(" "), '{"', '"}', '": "', "[", "]", "{", "}", ",", "\n", "\\", '"', "\ud800"])


@given(st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join)), st.sampled_from(FLAVOURS))
def test_no_text_breaks_the_parser(text: str, flavour: Flavour) -> None:
    read = parse_sample(text, flavour, "Describe it.")
    if isinstance(read, Rejection):
        assert read.reason in ("unreadable", "cut off", "turn order", "empty")
        assert read.reason in REASONS
        assert read.detail.isprintable()
    else:
        assert [turn.role for turn in read] == ["user", "assistant"] * (len(read) // 2) != []


KEYS = st.sampled_from(["turns", "question", "answer", "role", "content", "questions", "answers", "x"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner),
    max_leaves=8,
)


@given(VALUES, st.sampled_from(FLAVOURS))
def test_no_json_breaks_the_parser(value: object, flavour: Flavour) -> None:
    read = parse_sample(json.dumps(value), flavour, "Describe it.")
    assert isinstance(read, Rejection) or all(isinstance(turn.text, str) for turn in read)


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1).map(str.strip).filter(lambda text: text and "\r" not in text)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), st.booleans(), st.sampled_from([None, 1]))
def test_the_requested_form_is_read_unchanged(
    pairs: list[tuple[str, str]], ascii_only: bool, indent: int | None
) -> None:
    turns = [{"question": question, "answer": answer} for question, answer in pairs]
    read = parse_sample(json.dumps({"turns": turns}, ensure_ascii=ascii_only, indent=indent), "conversation")
    texts = [text for pair in pairs for text in pair]
    assert read == tuple(Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(texts))


@given(st.integers(min_value=0, max_value=len(JSON) - 1))
def test_of_truncated_conversations_only_whole_turns_are_accepted(length: int) -> None:
    read = parse_sample(JSON[:length], "conversation")
    if length > JSON.rindex('"'):
        assert (read, type(read)) == (parse_sample(JSON, "conversation"), CutTurns)
    else:
        assert isinstance(read, Rejection)
        assert read.reason == ("cut off" if length else "empty")


THREE = [{"question": f"What is {n}?", "answer": f"It is, as said, {n}."} for n in range(3)]


@pytest.mark.parametrize(
    ("text", "min_turns", "kept"),
    [
        (json.dumps({"turns": THREE})[:-9], 2, 2),
        (json.dumps({"turns": THREE})[:-1], 2, 3),
        (json.dumps({"turns": THREE})[:-3], 2, 3),
        (json.dumps(THREE, indent=1)[:-30], 2, 2),
        ("Sure!\n```json\n" + json.dumps({"turns": THREE})[:-20], 2, 2),
        (json.dumps({"turns": THREE})[:-66], 2, None),
        (json.dumps({"turns": THREE})[:-66], 1, 1),
        (json.dumps(ROLES[:2] * 2)[:-8], 2, None),
        (json.dumps(ROLES[:2] * 3)[:-8], 2, 2),
    ],
)
def test_whole_turns_before_the_end_are_kept(text: str, min_turns: int, kept: int | None) -> None:
    read = parse_sample(text, "conversation", min_turns=min_turns)
    assert (len(read) // 2 if isinstance(read, CutTurns) else None) == kept
    assert kept or isinstance(read, Rejection)


def test_a_description_or_an_answer_without_its_end_is_cut_off() -> None:
    assert parse_sample('{"description": "A dog lies the', "detail", "?") == Rejection(
        "cut off", """the JSON ends with '{"description": "A dog lies the'"""
    )
    whole = (Turn("user", "?"), Turn("assistant", "A dog lies."))
    assert parse_sample('{"description": "A dog lies."', "detail", "?") == whole
    assert isinstance(parse_sample('{"question": "Why?", "answer": "Bec', "reasoning"), Rejection)
