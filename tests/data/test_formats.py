"""Rows of every form become the same conversations; repairs are noted, and anything else is refused by its kind."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from lora_llava.data import Conversation, Turn
from lora_llava.data.formats import (
    BRIEF_REQUESTS,
    LEADING_ANSWER_CUT,
    OPEN_QUESTION_CUT,
    PLACEHOLDER_ADDED,
    Columns,
    RowError,
    read_row,
)

SHOWN = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A dog."))
SAID = (Turn("user", "What?"), Turn("assistant", "A dog."))


def llava(*texts: str) -> list[dict[str, str]]:
    """LLaVA's messages, the human first."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def chat(*contents: Any) -> list[dict[str, Any]]:
    """transformers' messages, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def part(kind: str, **content: Any) -> dict[str, Any]:
    return {"type": kind, **content}


WHAT = part("text", text="What?")
ONE = [
    {"image": "a.png", "conversations": llava("What?\n<image>", "A dog.")},
    {"image": "a.png", "conversations": llava("<image>\nWhat?", "A dog."), "messages": None},
    {"images": ["a.png"], "conversations": llava(" <image> What? ", "A dog.")},
    {"images": "a.png", "conversation": llava("<image>What?", "A dog.")},
    {"image": "", "images": ["a.png"], "conversations": llava("<image>What?", "A dog.")},
    {"image": None, "images": ("a.png",), "messages": chat("<image>\nWhat?", "A dog.")},
    {"images": ["a.png"], "messages": chat([part("image"), WHAT], [part("text", text="A dog.")])},
    {"images": ["a.png"], "messages": chat([part("image", image=None, path=None), WHAT], "A dog.")},
    {"messages": chat([part("image", image="a.png"), WHAT], "A dog.")},
    {"messages": chat([part("image", path="a.png"), WHAT], "A dog.")},
    {"messages": chat([WHAT, part("image", url="a.png")], "A dog.")},
    {"messages": chat([part("image_url", image_url="a.png"), WHAT], "A dog.")},
    {"messages": chat([part("image_url", image_url={"url": "a.png", "detail": "low"}), WHAT], "A dog.")},
    {"image": "a.png", "question": "<image> What?", "answer": "A dog."},
    {
        "images": ["a.png"],
        "conversations": [
            {"role": None, "from": "user", "value": "<image>\nWhat?"},
            {"role": "assistant", "content": "A dog."},
        ],
    },
]


@pytest.mark.parametrize("row", ONE)
def test_every_form_becomes_the_same_conversation(row: dict[str, Any]) -> None:
    assert read_row(row | {"id": 7}, 0) == Conversation("7", SHOWN, ("a.png",))
    assert read_row(row, 3) == Conversation("3", SHOWN, ("a.png",))
    assert read_row(row | {"id": None}, 3, form="captions") == Conversation("3", SHOWN, ("a.png",))


UNMENTIONED = [
    {"image": "a.png", "conversations": llava("What?", "A dog.")},
    {"images": ["a.png"], "messages": chat("What?", "A dog.")},
    {"image": "a.png", "question": "What?", "answer": "A dog."},
]


@pytest.mark.parametrize("row", UNMENTIONED)
def test_an_image_that_no_text_mentions_is_put_first(row: dict[str, Any]) -> None:
    notes = () if "question" in row else (PLACEHOLDER_ADDED,)  # in a table nothing is amiss
    wanted = Conversation("0", SHOWN, ("a.png",), notes=notes)
    assert read_row(row, 0) == wanted
    assert read_row(row, 0, position="as_written") == wanted


@pytest.mark.parametrize("row", [{key: row[key] for key in row if "image" not in key} for row in UNMENTIONED])
@pytest.mark.parametrize("empty", [{}, {"image": ""}, {"image": None}, {"images": []}, {"images": ()}])
def test_a_row_may_have_no_image(row: dict[str, Any], empty: dict[str, Any]) -> None:
    for position in ("first", "last", "random", "as_written"):
        assert read_row(row | empty, 0, position=position) == Conversation("0", SAID)  # type: ignore[arg-type]


SHAREGPT = ["human", "user", "prompter"], ["gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"]


@pytest.mark.parametrize("asks", SHAREGPT[0])
@pytest.mark.parametrize("answers", SHAREGPT[1])
def test_share_gpt_s_names_of_who_speaks(asks: str, answers: str) -> None:
    turns = [("system", "Be kind."), (asks, "What?"), (answers, "A dog.")]
    wanted = Conversation("0", (Turn("system", "Be kind."), *SAID))
    assert read_row({"conversations": [{"from": who, "value": text} for who, text in turns]}, 0) == wanted
    assert read_row({"messages": [{"role": who, "content": text} for who, text in turns]}, 0) == wanted


def test_a_row_s_system_text_comes_first() -> None:
    row = {"system": "Be kind.", "conversations": llava("What?", "A dog.")}
    assert read_row(row, 0) == Conversation("0", (Turn("system", "Be kind."), *SAID))
    assert read_row(row | {"system": ""}, 0) == read_row(row | {"system": None}, 0) == Conversation("0", SAID)


def test_a_table_s_columns_are_named() -> None:
    columns = Columns(image="bild", question="frage", answer="antwort", id="nr")
    row = {"nr": "x", "bild": "a.png", "frage": "What?", "antwort": "A dog.", "image": "b.png", "id": 5}
    assert read_row(row, 0, columns=columns) == Conversation("x", SHOWN, ("a.png",))


@pytest.mark.parametrize(("value", "text"), [(5, "5"), (2.5, "2.5"), (0, "0"), (True, "True"), ("x", "x")])
def test_a_number_is_a_fair_question_and_answer(value: Any, text: str) -> None:
    turns = (Turn("user", text), Turn("assistant", text))
    assert read_row({"question": value, "answer": value}, 0) == Conversation("0", turns)


def test_a_bare_caption_answers_a_brief_request() -> None:
    row = {"image": "a.png", "caption": "a red cube"}
    drawn: Counter[str] = Counter()
    for number in range(330):
        found = read_row(row, number, form="captions")
        request = found.turns[0].text.removeprefix("<image>\n")
        drawn[request] += 1
        turns = (Turn("user", f"<image>\n{request}"), Turn("assistant", "a red cube"))
        assert found == Conversation(str(number), turns, ("a.png",))
        assert read_row(row, number, form="captions") == found
    assert set(drawn) == set(BRIEF_REQUESTS)
    assert min(drawn.values()) >= 10
    again = [read_row(row, number, form="captions", seed=1).turns[0].text for number in range(50)]
    assert again != [read_row(row, number, form="captions").turns[0].text for number in range(50)]


def test_a_caption_s_column_is_named() -> None:
    row = {"bild": "a.png", "text": 5}
    found = read_row(row, 0, form="captions", columns=Columns(image="bild", caption="text"), position="last")
    assert found.turns[0].text.split("\n")[1:] == ["<image>"]
    assert (found.turns[1], found.images) == (Turn("assistant", "5"), ("a.png",))


MIDDLE = {"image": "a.png", "messages": chat("In <image> what?", "A dog.", "Sure?", "Yes.")}
LATER = {"image": "a.png", "messages": chat("Hi", "Yo", "In <image> what?", "A dog.")}


@pytest.mark.parametrize(
    ("position", "text"),
    [("first", "<image>\nIn  what?"), ("last", "In  what?\n<image>"), ("as_written", "In <image> what?")],
)
def test_the_recipe_sets_the_place_of_an_image(position: Any, text: str) -> None:
    said = [turn.text for turn in read_row(MIDDLE, 0, position=position).turns]
    assert said == [text, "A dog.", "Sure?", "Yes."]
    said = [turn.text for turn in read_row(LATER, 0, position=position).turns]
    assert said == ["Hi", "Yo", text, "A dog."]


def test_a_coin_is_thrown_for_every_row() -> None:
    def throw(seed: int) -> list[bool]:
        texts = [read_row(MIDDLE, n, position="random", seed=seed).turns[0].text for n in range(400)]
        assert set(texts) == {"<image>\nIn  what?", "In  what?\n<image>"}
        return [text.startswith("<image>") for text in texts]

    assert 160 < sum(throw(0)) < 240
    assert throw(0) == throw(0) != throw(1)


@pytest.mark.parametrize("position", ["first", "last", "random", "as_written"])
def test_a_question_may_be_nothing_but_its_image(position: Any) -> None:
    turns = (Turn("user", "<image>"), Turn("assistant", "A dog."))
    row = {"image": "a.png", "conversations": llava("<image>\n", "A dog.")}
    assert read_row(row, 0, position=position) == Conversation("0", turns, ("a.png",))


@pytest.mark.parametrize("position", ["first", "last", "random", "as_written"])
def test_several_images_stay_where_they_stand(position: Any) -> None:
    row = {"images": ["a.png", "b.png"], "conversations": llava("<image> or <image>?", "Yes.", "Or?", "No.")}
    found = read_row(row, 0, position=position)
    assert ([turn.text for turn in found.turns], found.images, found.notes) == (
        ["<image> or <image>?", "Yes.", "Or?", "No."],
        ("a.png", "b.png"),
        (),
    )
    row = {"images": ["a.png", "b.png"], "messages": chat("What?", "A dog.")}
    turns = (Turn("user", "<image>\n<image>\nWhat?"), Turn("assistant", "A dog."))
    wanted = Conversation("0", turns, ("a.png", "b.png"), notes=(PLACEHOLDER_ADDED,))
    assert read_row(row, 0, position=position) == wanted


def test_images_of_messages_come_in_their_order() -> None:
    first = [part("image", image="a.png"), WHAT, part("image_url", image_url={"url": "b.png"})]
    row = {"messages": chat(first, "A dog.", [part("image", path="c.png"), WHAT], "A dog.")}
    asked = (Turn("user", "<image>\nWhat?\n<image>"), SHOWN[1], *SHOWN)
    assert read_row(row, 0) == Conversation("0", asked, ("a.png", "b.png", "c.png"))


@pytest.mark.parametrize("image", [{"path": None}, {"path": "a.png"}, {"bytes": b"x", "path": None}, {"bytes": None}])
def test_an_image_that_is_stored_in_the_table_is_named_by_its_row(image: dict[str, Any]) -> None:
    row = {"image": image, "messages": chat("<image>\nWhat?", "A dog.")}
    assert read_row(row, 12, embedded=True) == Conversation("12", SHOWN, ("12",))
    row = {"images": [image], "messages": row["messages"]}
    assert read_row(row, 12, embedded=True) == Conversation("12", SHOWN, ("12",))
    row = {"images": [image, image], "messages": chat("<image><image>", "A dog.")}
    turns = (Turn("user", "<image><image>"), SHOWN[1])
    assert read_row(row, 12, embedded=True) == Conversation("12", turns, ("12:0", "12:1"))


def test_an_image_that_a_row_names_by_its_path_is_a_file() -> None:
    row = {"image": {"path": "a.png"}, "messages": chat("<image>\nWhat?", "A dog.")}
    assert read_row(row, 12) == Conversation("12", SHOWN, ("a.png",))
    with pytest.raises(RowError, match="an image's name is"):
        read_row(row | {"image": {"bytes": b"x", "path": None}}, 12)


def test_text_before_the_first_question_and_after_the_last_answer_is_cut_and_noted() -> None:
    reported, asked, answered = ({"from": "gpt", "value": "Hello."}, *llava("What?", "A dog."))
    system = {"from": "system", "value": "Be kind."}
    cases = [
        ([reported, asked, answered], (LEADING_ANSWER_CUT,)),
        ([asked, answered, asked], (OPEN_QUESTION_CUT,)),
        ([reported, asked, answered, asked], (LEADING_ANSWER_CUT, OPEN_QUESTION_CUT)),
    ]
    for messages, notes in cases:
        assert read_row({"conversations": messages}, 0) == Conversation("0", SAID, notes=notes)
        turns = (Turn("system", "Be kind."), *SAID)
        assert read_row({"conversations": [system, *messages]}, 0) == Conversation("0", turns, notes=notes)


def test_an_image_of_a_question_that_is_cut_is_not_shown_with_another() -> None:
    row = {"image": "a.png", "conversations": llava("Hi", "Yo", "<image>\nWhat?")}
    with pytest.raises(RowError):
        read_row(row, 0)


NO_QUESTION = "the conversation has no question; add one"
NO_ANSWER = "the conversation has no answer; add one"
FIX = "; columns are named by data.columns"
FORMS = "it lacks conversations, messages, or question and answer; it has "
TEXT, ASKED, ANSWERED = chat("What?", "A dog."), {"question": "What?"}, {"answer": "A dog."}
BAD: list[tuple[Any, str, str]] = [
    ("text", "malformed row", "the row is str; a row has id, image and conversations"),
    (None, "malformed row", "the row is NoneType; a row has id, image and conversations"),
    ([{}], "malformed row", "the row is list; a row has id, image and conversations"),
    ({}, "missing column", FORMS + "nothing" + FIX),
    ({"a": None, "conversations": None}, "missing column", FORMS + "nothing" + FIX),
    ({"id": "7", "image": "a.png"}, "missing column", FORMS + "'id', 'image'" + FIX),
    (ASKED | {"text": "x"}, "missing column", "it lacks answer; it has 'question', 'text'" + FIX),
    (ANSWERED, "missing column", "it lacks question; it has 'answer'" + FIX),
    (
        {"conversations": [], "messages": []},
        "both formats",
        "the row has conversations and messages, which are two formats; keep one",
    ),
    (
        ASKED | ANSWERED | {"messages": []},
        "both formats",
        "the row has messages and question/answer, which are two formats; keep one",
    ),
    ({"conversations": "text"}, "malformed row", "conversations is 'text'; a row has id, image and conversations"),
    (
        {"messages": {"role": "user"}},
        "malformed row",
        "messages is {'role': 'user'}; a row has id, image and conversations",
    ),
    ({"messages": ["Hi"]}, "malformed row", "message 0 is 'Hi'; give an object with a role and its text"),
    (
        {"messages": [{"role": "user", "from": "human", "content": "Hi"}]},
        "both formats",
        "message 0 has both role and from; keep one",
    ),
    (
        {"conversations": [*llava("Hi"), {"from": "hooman", "value": "x"}]},
        "unknown role",
        "message 1: role is 'hooman'; use one of human, user, prompter, gpt, assistant, chatgpt, bing, bard, model, "
        "bot, system",
    ),
    (
        {"conversations": [{"value": "x"}]},
        "unknown role",
        "message 0: role is None; use one of human, user, prompter, gpt, assistant, chatgpt, bing, bard, model, "
        "bot, system",
    ),
    (
        {"conversations": [{"from": "human"}]},
        "malformed row",
        "message 0: content is None; give a string or a list of parts",
    ),
    ({"messages": chat(b"Hi", "Yo")}, "malformed row", 'message 0: a part has type None; use "text" or "image"'),
    (
        {"messages": chat([part("video")], "Yo")},
        "malformed row",
        'message 0: a part has type \'video\'; use "text" or "image"',
    ),
    (
        {"messages": chat("Hi", [part("text", text=5)])},
        "malformed row",
        "message 1: a text part is 5; give a string as its text",
    ),
    ({"messages": []}, "empty conversation", "the conversation is empty; give a question and an answer"),
    (
        {"messages": [{"role": "system", "content": "x"}]},
        "empty conversation",
        "the conversation is empty; give a question and an answer",
    ),
    ({"messages": TEXT[1:]}, "one-sided conversation", NO_QUESTION),
    ({"messages": TEXT[:1] * 2}, "one-sided conversation", NO_ANSWER),
    ({"messages": TEXT[::-1]}, "one-sided conversation", "no question of the conversation is answered; add an answer"),
    (
        {"messages": chat("a", "b") + chat("a", "b")[1:]},
        "role order",
        "turn 2 is the assistant's; it should be the user's",
    ),
    ({"messages": chat("a") + chat("a", "b")}, "role order", "turn 1 is the user's; it should be the assistant's"),
    (
        {"messages": [*TEXT, {"role": "system", "content": "x"}, *TEXT]},
        "role order",
        "turn 2 is the system's; it should be the user's",
    ),
    ({"messages": chat("a", " \n")}, "empty answer", "turn 1: the answer is empty"),
    ({"messages": chat("", "b")}, "empty question", "turn 0: the question is empty"),
    ({"messages": chat("<image>", "b")}, "placeholder count", "1 <image> placeholders for 0 images; make them equal"),
    (
        {"messages": chat("<image> <image>", "b"), "image": "a.png"},
        "placeholder count",
        "2 <image> placeholders for 1 images; make them equal",
    ),
    (
        {"messages": chat("<image>", "b"), "images": ["a.png", "b.png"]},
        "placeholder count",
        "1 <image> placeholders for 2 images; make them equal",
    ),
    (
        {"messages": chat([part("image", image="a.png"), part("image"), WHAT], "b")},
        "placeholder count",
        "2 <image> placeholders for 1 images; make them equal",
    ),
    (
        {"messages": chat([part("image", image="a.png"), WHAT], "b"), "image": "a.png"},
        "both formats",
        "its images are named in image and in its messages; keep one",
    ),
    ({"messages": TEXT, "image": 5}, "malformed row", "an image's name is 5; it should be a file's name"),
    (
        {"messages": TEXT, "image": {"url": "x"}},
        "malformed row",
        "an image's name is {'url': 'x'}; it should be a file's name",
    ),
    (
        {"messages": TEXT, "images": ["a.png", None]},
        "malformed row",
        "an image's name is None; it should be a file's name",
    ),
    (
        {"messages": TEXT, "images": [["a.png"]]},
        "malformed row",
        "an image's name is ['a.png']; it should be a file's name",
    ),
    (ASKED | {"answer": ["x"]}, "malformed row", "answer is ['x']; it should be text"),
    (
        ANSWERED | {"question": {"x": "y" * 99}},
        "malformed row",
        "question is {'x': '" + "y" * 53 + "; it should be text",
    ),
    (ASKED | {"answer": ""}, "empty answer", "turn 1: the answer is empty"),
]


@pytest.mark.parametrize(("row", "kind", "message"), BAD)
def test_malformed_rows_are_refused_by_kind(row: Any, kind: str, message: str) -> None:
    with pytest.raises(RowError) as caught:
        read_row(row, 0)
    assert (caught.value.kind, str(caught.value)) == (kind, message)


def test_a_caption_needs_its_column() -> None:
    with pytest.raises(RowError) as caught:
        read_row({"image": "a.png", "text": "x"}, 0, form="captions")
    assert (
        str(caught.value)
        == "it lacks conversations, messages, question and answer, or caption; it has 'image', 'text'" + FIX
    )


def test_a_row_s_missing_columns_are_named_as_the_recipe_names_them() -> None:
    with pytest.raises(RowError) as caught:
        read_row({"x": 1}, 0, columns=Columns(question="frage", answer="antwort"))
    assert str(caught.value) == "it lacks conversations, messages, or frage and antwort; it has 'x'" + FIX


@pytest.mark.parametrize("images", [[""], ["a\0b.png"], "a\0b.png"])
def test_an_image_name_is_a_file_name(images: Any) -> None:
    with pytest.raises(RowError):
        read_row({"messages": TEXT, "images": images}, 0)
