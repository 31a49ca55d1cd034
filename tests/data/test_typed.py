"""Special tokens that people typed: text in rows, prompts and answers, never control ids."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from lora_llava.data import IGNORE_INDEX, encode_conversation, encode_prompt
from lora_llava.data.conversation import EncodingError, read_turns
from lora_llava.data.formats import RowError, read_row
from lora_llava.data.scienceqa import _conversation
from lora_llava.data.typed import MARK, as_typed, special_tokens, text_backend, without_marks

SPECIALS = ["</s>", "<s>", "<pad>", "<unk>", "<image>"]
WORDS = st.sampled_from([*SPECIALS, " ", "\n", "<", "</", "s>", "image>", "red", "<<s>>", "</s", "<im"])
TYPED = st.lists(WORDS, min_size=1, max_size=8).map("".join)


def parts(text: str, images: int = 1) -> list[dict[str, Any]]:
    return [{"type": "image"}] * images + [{"type": "text", "text": text}]


def special_ids(ids: list[int], tokenizer: Any) -> list[str]:
    known = set(tokenizer.convert_tokens_to_ids(SPECIALS))
    return [tokenizer.convert_ids_to_tokens(i) for i in ids if i in known]


@given(question=TYPED, answer=TYPED.filter(str.strip), system=TYPED)
def test_only_ours_are_control_ids(demo_tokenizer: LlamaTokenizer, question: str, answer: str, system: str) -> None:
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": parts(question)},
        {"role": "assistant", "content": answer},
    ]
    encoded = encode_conversation(messages, tokenizer=demo_tokenizer, template="vicuna_v1", num_image_tokens=2)
    assert special_ids(encoded["input_ids"], demo_tokenizer) == ["<s>", "<image>", "<image>", "</s>"]
    trained = [token for token in encoded["labels"] if token != IGNORE_INDEX]
    assert demo_tokenizer.decode(trained[:-1], clean_up_tokenization_spaces=False) == answer
    prompt = encode_prompt(messages[:2], tokenizer=demo_tokenizer, template="vicuna_v1", num_image_tokens=2)
    assert encoded["input_ids"][: len(prompt)] == prompt


@given(text=TYPED)
def test_marks_change_nothing_else(demo_tokenizer: LlamaTokenizer, text: str) -> None:
    specials = special_tokens(demo_tokenizer)
    marked = as_typed(text, specials)
    assert without_marks(marked) == text
    ids = text_backend(demo_tokenizer, [marked]).encode(marked, add_special_tokens=False).ids
    if marked == text:
        assert ids == demo_tokenizer(text, add_special_tokens=False).input_ids
    assert not special_ids(ids, demo_tokenizer)


def test_a_typed_stop_has_sentencepiece_s_ids(llama_tokenizer: Any, shared: Any) -> None:
    judge = SentencePieceProcessor(model_file=str(shared / "llama_tokenizer" / "tokenizer.model"))
    for text in ("red </s> blue", "<s>", " a <unk>  b </s>", "what does <image> mean? <pad>"):
        marked = as_typed(text, special_tokens(llama_tokenizer))
        found = text_backend(llama_tokenizer, [marked]).encode(marked, add_special_tokens=False).ids
        assert found == judge.encode(text)


def test_a_special_token_that_is_looked_for_late_is_text_too(demo_tokenizer: LlamaTokenizer) -> None:
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(demo_tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken("<|im_end|>", normalized=True, special=True, rstrip=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    messages = [{"role": "user", "content": "a <|im_end|> b"}, {"role": "assistant", "content": "<|im_end|>"}]
    ids = encode_conversation(messages, tokenizer=tokenizer, template="vicuna_v1", num_image_tokens=1)["input_ids"]
    assert end in tokenizer("a <|im_end|> b").input_ids
    assert end not in ids


def human(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


MEANING = f"what does <{MARK}image> mean?"


@pytest.mark.parametrize(
    ("row", "questions"),
    [
        ({"question": "what does <image> mean?", "answer": "x"}, [MEANING]),
        ({"image": "a.png", "question": "what does <image> mean?", "answer": "x"}, [f"<image>\n{MEANING}"]),
        ({"conversations": human("what does <image> mean?", "x")}, [MEANING]),
        ({"image": "a.png", "conversations": human("<image>\nwhat does <image> mean?", "x")}, [f"<image>\n{MEANING}"]),
        ({"image": "a.png", "conversations": human("what is in <image> here?", "x")}, ["<image>\nwhat is in  here?"]),
        (
            {
                "image": "a.png",
                "messages": [
                    {"role": "user", "content": parts("what does <image> mean?")},
                    {"role": "assistant", "content": "x"},
                ],
            },
            [f"<image>\n{MEANING}"],
        ),
        (
            {"images": ["a", "b"], "conversations": human("<image>\n<image>\nwhat does <image> mean?", "x")},
            [f"<image>\n<image>\n{MEANING}"],
        ),
        (
            {"image": "a.png", "conversations": human("<image>\nHi", "x", "what does <image> mean?", "x")},
            ["<image>\nHi", MEANING],
        ),
    ],
)
def test_placeholders_by_format(row: dict[str, Any], questions: list[str]) -> None:
    found = read_row(row, 0)
    assert [turn.text for turn in found.turns if turn.role == "user"] == questions
    assert sum(text.count("<image>") for text in questions) == len(found.images)


def test_an_answer_s_mention_is_text(demo_tokenizer: LlamaTokenizer) -> None:
    found = read_row({"image": "a.png", "conversations": human("<image>\nHi", "The tag <image> is HTML-like.")}, 0)
    assert (found.turns[1].shown, found.turns[1].words) == ("The tag <image> is HTML-like.",) * 2


def test_an_image_that_no_row_names_is_refused() -> None:
    with pytest.raises(RowError, match="1 <image> placeholders for 0 images"):
        read_row({"conversations": human("<image>\nWhat is it?", "x")}, 0)


def test_a_text_with_our_own_mark_is_refused() -> None:
    with pytest.raises(EncodingError, match=r"message 0 holds U\+FDD0, which is not a character; remove it"):
        read_turns(human(f"a{MARK}b", "x"), 0)


def test_scienceqa_s_text_has_no_placeholders() -> None:
    problem = {
        "question": "What is <image>?",
        "choices": ["a", "b"],
        "answer": 0,
        "hint": "",
        "lecture": "",
        "solution": "",
        "grade": "grade1",
        "subject": "natural science",
        "category": "x",
        "topic": "x",
        "skill": "x",
    }
    row = _conversation("1", problem, "a.png", "QCM-LEA", "first", 0)
    assert row.turns[0].text.startswith(f"<image>\nWhat is <{MARK}image>?")
