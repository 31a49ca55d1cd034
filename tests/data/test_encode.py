"""Encoding: whole lists of ids and labels, what is trained, what is refused, what is cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from lora_llava.core.errors import UserError
from lora_llava.data import (
    IGNORE_INDEX,
    TEMPLATES,
    EncodingError,
    OverlongError,
    Template,
    encode_conversation,
    encode_prompt,
    get_template,
)

V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
V0 = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
Lists = tuple[list[int], list[int]]
Spell = Callable[..., Lists]


def said(*texts: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def encode(tokenizer: Any, messages: Sequence[Any], template: str | Template, **more: Any) -> Lists:
    """Ids and labels of a conversation whose images take three tokens."""
    encoded = encode_conversation(messages, tokenizer=tokenizer, template=template, num_image_tokens=3, **more)
    assert list(encoded) == ["input_ids", "labels"]
    return encoded["input_ids"], encoded["labels"]


TWO_TURNS = said("<image>\nWhat is it?", "A dog.", "Are {you} sure?", "Yes,\n it  is.")
SPELLED = {
    "vicuna_v1": [
        (f"{V1} USER: <image> \nWhat is it? ASSISTANT:", False),
        (" A dog.</s>", True),
        ("USER: Are {you} sure? ASSISTANT:", False),
        (" Yes,\n it  is.</s>", True),
    ],
    "vicuna_v0": [
        (f"{V0}\n\n### Human: <image> \nWhat is it?\n### Assistant:", False),
        (" A dog.\n###", True),
        (" Human: Are {you} sure?\n### Assistant:", False),
        (" Yes,\n it  is.\n###", True),
        (" ", False),
    ],
    "llama_2": [
        (f"[INST] <<SYS>>\n{LLAMA_2}\n<</SYS>>\n\n<image> \nWhat is it? [/INST]", False),
        (" A dog. </s>", True),
        ("[INST] Are {you} sure? [/INST]", False),
        (" Yes,\n it  is. </s>", True),
    ],
    "mistral": [
        ("[INST] <image> \nWhat is it? [/INST]", False),
        (" A dog.</s>", True),
        ("[INST] Are {you} sure? [/INST]", False),
        (" Yes,\n it  is.</s>", True),
    ],
}


@pytest.mark.parametrize("template", SPELLED)
def test_two_turns_give_these_ids_and_labels(letters: LlamaTokenizer, spell: Spell, template: str) -> None:
    assert encode(letters, TWO_TURNS, template) == spell(*SPELLED[template])


def test_plain_keeps_image_and_caption(letters: LlamaTokenizer, spell: Spell) -> None:
    messages = said("Describe it.\n<image>", "a red cube")
    assert encode(letters, messages, "plain") == spell(("<image>", False), (" a red cube\n", True))


def test_every_template_is_tested() -> None:
    tested_elsewhere = {"chatml", "qwen", "llama_3", "phi_3"}  # test_chat_templates.py
    assert set(SPELLED) | {"plain"} | tested_elsewhere == set(TEMPLATES)


def test_a_first_message_by_system_replaces_the_system_text(letters: LlamaTokenizer, spell: Spell) -> None:
    messages = [{"role": "system", "content": "Be {brief}."}, *said("Hi", "Yo")]
    expected = spell(("Be {brief}. USER: Hi ASSISTANT:", False), (" Yo</s>", True))
    assert encode(letters, messages, "vicuna_v1") == expected


WITHOUT_SYSTEM = {
    "vicuna_v1": "USER: Hi ASSISTANT:",
    "vicuna_v0": "### Human: Hi\n### Assistant:",
    "llama_2": "[INST] Hi [/INST]",
}


@pytest.mark.parametrize("template", WITHOUT_SYSTEM)
def test_an_empty_system_text_leaves_no_trace(letters: LlamaTokenizer, spell: Spell, template: str) -> None:
    expected = spell((WITHOUT_SYSTEM[template], False))[0]
    by_template = encode(letters, said("Hi", "Yo"), get_template(template, ""))
    by_message = encode(letters, [{"role": "system", "content": ""}, *said("Hi", "Yo")], template)
    assert by_template == by_message
    assert by_template[0][: len(expected)] == expected


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (["image", "What?"], "<image>\nWhat?"),
        (["What?", "image"], "What?\n<image>"),
        (["Left:", "image", "image", " right"], "Left:\n<image>\n<image>\n right"),
        (["a", "b"], "ab"),
        ([], ""),
    ],
)
def test_parts_are_the_same_as_a_string(letters: LlamaTokenizer, parts: list[str], text: str) -> None:
    content = [{"type": "image"} if part == "image" else {"type": "text", "text": part} for part in parts]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yo"}]
    assert encode(letters, messages, "vicuna_v1") == encode(letters, said(text, "Yo"), "vicuna_v1")


@pytest.mark.parametrize("value", ["<image>\nWhat?", "What?\n<image>", "What? <image>", "<image>What?"])
def test_llava_rows_get_their_image_in_front(letters: LlamaTokenizer, value: str) -> None:
    rows = [{"from": "human", "value": value}, {"from": "gpt", "value": "Yo"}]
    assert encode(letters, rows, "vicuna_v1") == encode(letters, said("<image>\nWhat?", "Yo"), "vicuna_v1")


def test_unicode_is_bytes_of_one_owner(letters: LlamaTokenizer, spell: Spell) -> None:
    messages = [{"role": "system", "content": "Être 中?"}, *said("😀", "é 中😀")]
    expected = spell(("Être 中? USER: 😀 ASSISTANT:", False), (" é 中😀</s>", True))
    assert encode(letters, messages, "vicuna_v1") == expected


@pytest.mark.parametrize("template", [*SPELLED, "plain"])
@pytest.mark.parametrize("name", ["letters", "demo_tokenizer", "llama_tokenizer"])
def test_one_bos_at_the_start(request: pytest.FixtureRequest, name: str, template: str) -> None:
    messages = said("<image>\nWhat is it?", "A dog.") if template == "plain" else TWO_TURNS
    ids, labels = encode(request.getfixturevalue(name), messages, template)
    assert [place for place, token in enumerate(ids) if token == 1] == [0]
    assert labels[0] == IGNORE_INDEX
    assert len(ids) == len(labels)


SAID = st.lists(st.sampled_from(["a", " ", "  ", "\n", "{}", "é", "中", ".", "USER:", "##"]), max_size=6).map("".join)


@settings(max_examples=50, deadline=None)
@given(turns=st.lists(st.tuples(SAID, SAID.filter(str.strip)), min_size=1, max_size=4))
@pytest.mark.parametrize(("template", "stop"), [("vicuna_v1", "</s>"), ("vicuna_v0", "\n###"), ("llama_2", " </s>")])
def test_answers_and_their_stops_alone_are_trained(
    letters: LlamaTokenizer, template: str, stop: str, turns: list[tuple[str, str]]
) -> None:
    ids, labels = encode(letters, said(*(text for turn in turns for text in turn)), template)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    runs = [list(run) for trained, run in groupby(labels, lambda label: label != IGNORE_INDEX) if trained]
    assert [written(letters, run) for run in runs] == [f" {answer}{stop}" for _, answer in turns]


def written(tokenizer: LlamaTokenizer, ids: list[int]) -> str:
    """The text that single-letter pieces spell."""
    pieces = tokenizer.convert_ids_to_tokens(ids)
    found = [re.fullmatch("<0x(..)>", piece) for piece in pieces]
    parts = [
        bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()
        for piece, byte in zip(pieces, found, strict=True)
    ]
    return b"".join(parts).decode()


ONE_CAPTION = "template plain needs one image and one caption; use another template"


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([], "vicuna_v1", "the conversation does not end with an answer; add one"),
        (said("Hi"), "vicuna_v1", "the conversation does not end with an answer; add one"),
        ([{"role": "system", "content": "x"}], "vicuna_v1", "the conversation does not end with an answer; add one"),
        (said("Hi", ""), "vicuna_v1", "turn 1: the answer is empty"),
        (said("Hi", "Yo", "Hi", " \n"), "vicuna_v1", "turn 3: the answer is empty"),
        (said("Hi", "Yo")[1:], "vicuna_v1", "turn 0 is the assistant's; it should be the user's"),
        (said("Hi")[:1] * 2 + said("Hi", "Yo")[1:], "vicuna_v1", "turn 1 is the user's; it should be the assistant's"),
        (
            [*said("Hi"), {"role": "system", "content": "x"}, *said("Hi", "Yo")[1:]],
            "vicuna_v1",
            "turn 1 is the system's; it should be the assistant's",
        ),
        (said("<image>", "a", "b", "c"), "plain", ONE_CAPTION),
        (said("Hi", "a"), "plain", ONE_CAPTION),
        (
            [{"role": "tool", "content": "x"}],
            "plain",
            "message 0: role is 'tool'; use one of human, user, prompter, gpt, assistant, chatgpt, bing, bard, model, "
            "bot, system",
        ),
        ([{"role": "user", "content": None}], "plain", "message 0: content is None; give a string or a list of parts"),
        (
            [{"role": "user", "content": [{"type": "video"}]}],
            "plain",
            'message 0: a part has type \'video\'; use "text" or "image"',
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    letters: LlamaTokenizer, messages: list[Any], template: str, message: str
) -> None:
    with pytest.raises(EncodingError, match=f"^{re.escape(message)}$"):
        encode(letters, messages, template)


@pytest.mark.parametrize("part", ["What?", {"type": "text"}, {"type": "text", "text": None}, None])
def test_a_malformed_part_is_refused(letters: LlamaTokenizer, part: Any) -> None:
    with pytest.raises(EncodingError):
        encode(letters, [{"role": "user", "content": [part]}, *said("Hi", "Yo")[1:]], "vicuna_v1")


def test_plain_takes_one_image(letters: LlamaTokenizer) -> None:
    with pytest.raises(EncodingError, match="one image and one caption"):
        encode(letters, said("<image>\n<image>", "a"), "plain")


def test_an_unknown_template_names_the_nearest(letters: LlamaTokenizer) -> None:
    with pytest.raises(UserError) as caught:
        encode(letters, said("Hi", "Yo"), "vicuna")
    assert str(caught.value) == (
        "template: 'vicuna' is unknown (did you mean \"vicuna_v1\"?); use one of vicuna_v1, vicuna_v0, plain, llama_2, "
        "chatml, qwen, llama_3, phi_3, mistral"
    )


def test_a_tokenizer_without_the_image_is_refused() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=LlamaTokenizer(vocab={"<unk>": 0}, merges=[]).backend_tokenizer)
    with pytest.raises(EncodingError, match=r"^the tokenizer does not know <image>; add it as a special token$"):
        encode(bare, said("Hi", "Yo"), "vicuna_v0")


def test_a_stop_of_another_model_is_refused(letters: LlamaTokenizer) -> None:
    other = Template(name="other", system="", system_format="", user_format="{}:", stop="<|end|>")
    message = "template other stops on '<|end|>', the tokenizer on '</s>'; use a template of this model"
    with pytest.raises(EncodingError, match=f"^{re.escape(message)}$"):
        encode(letters, said("Hi", "Yo"), other)


def test_a_token_over_the_border_of_an_answer_is_refused(letters: LlamaTokenizer) -> None:
    merging = Template(name="merging", system="", system_format="", user_format="{}#", answer_prefix="", stop="</s>")
    message = (
        "one token covers the border between prompt and answer in 'Hi##Yo</s>'; put a space between them, or remove "
        "the line breaks that the answer starts with"
    )
    with pytest.raises(EncodingError, match=f"^{re.escape(message)}$"):
        encode(letters, said("Hi", "#Yo"), merging)
    answer = letters.convert_tokens_to_ids(["Y", "o", "</s>"])
    assert encode(letters, said("Hi", "Yo"), merging)[1] == [-100] * 5 + answer


@pytest.mark.parametrize("template", SPELLED)
def test_a_limit_cuts_the_end_of_the_last_answer_only(letters: LlamaTokenizer, spell: Spell, template: str) -> None:
    ids, labels = spell(*SPELLED[template])
    last = len(spell(*SPELLED[template][:3])[0])
    for limit in range(1, len(ids) + 2):
        if limit <= last:
            with pytest.raises(OverlongError) as caught:
                encode(letters, TWO_TURNS, template, max_length=limit)
            assert str(caught.value) == (
                f"the sample has {len(ids)} tokens and its last answer starts at token {last}: "
                f"a limit of {limit} would cut the answer away"
            )
        else:
            assert encode(letters, TWO_TURNS, template, max_length=limit) == (ids[:limit], labels[:limit])


def test_a_caption_is_cut_but_never_its_image(letters: LlamaTokenizer, spell: Spell) -> None:
    messages, (ids, labels) = said("<image>", "ab"), spell(("<image>", False), (" ab\n", True))
    assert encode(letters, messages, "plain", max_length=5) == (ids[:5], labels[:5])
    with pytest.raises(OverlongError, match="starts at token 4: a limit of 4 would cut the answer away"):
        encode(letters, messages, "plain", max_length=4)


@pytest.mark.parametrize("template", SPELLED)
def test_a_prompt_is_the_text_before_the_answer(letters: LlamaTokenizer, spell: Spell, template: str) -> None:
    for answer in (1, 3):
        prompt = encode_prompt(TWO_TURNS[:answer], tokenizer=letters, template=template, num_image_tokens=3)
        assert prompt == spell(*SPELLED[template][:answer])[0]
