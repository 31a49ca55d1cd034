"""The two laws of encoding: what is trained is what the stock processor serves, and it is LLaVA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoProcessor, LlamaTokenizer, PreTrainedTokenizerFast

from lora_llava.data import (
    IGNORE_INDEX,
    EncodingError,
    Template,
    chat_template,
    encode_conversation,
    get_template,
)
from lora_llava.data.encode import _tokenise, encode_spans
from lora_llava.data.templates.spans import Span
from lora_llava.model.base import assembled_config, build_processor
from lora_llava.model.families.tower_families import image_processor_of

TOKENIZERS = ["letters", "demo_tokenizer", "llama_tokenizer"]
IMAGE = Image.new("RGB", (6, 4), (10, 200, 30))
IMAGE_TOKENS = 4  # (32 / 16) ** 2
FRAGMENTS = [
    "a",
    "The dog",
    "7.5",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "{}",
    "{",
    "}",
    "{{",
    "%}",
    "é",
    "e\u0301",
    "中",
    "😀",
    "▁",
    "\u00a0",
    "\x85",
    "\\n",
    '"',
    "'''",
    "<",
    ".",
    ":",
    "?",
    "USER:",
    "ASSISTANT:",
    "[INST]",
    "### Human:",
    "#",
]
FITTING = ("vicuna_v1", "vicuna_v0", "plain", "llama_2", "mistral")
"""Templates that stop on </s> or on ordinary text; those with tokens of their own are in test_chat_templates.py."""
SPECIALS = ["</s>", "<s>", "<unk>", "<image>", "<pad>", "👩‍👧", "‍", "﻿", "\0"]
Serve = Callable[..., Any]


def texts(template: str) -> st.SearchStrategy[str]:
    """Texts of odd fragments; `vicuna_v0` gets none with its own mark."""
    fragments = [text for text in FRAGMENTS if template != "vicuna_v0" or "#" not in text]
    return st.lists(st.sampled_from(fragments), max_size=7).map("".join)


@st.composite
def conversations(draw: st.DrawFn, template: str) -> list[dict[str, Any]]:
    """Messages with images anywhere in the users' turns."""
    said = texts(template)
    text_part = said.map(lambda text: {"type": "text", "text": text})
    image_part = st.just({"type": "image", "image": IMAGE})
    content = st.one_of(said, st.lists(st.one_of(text_part, image_part), max_size=4))
    turns, system = draw(st.integers(1, 3)), st.one_of(st.just([]), said.map(lambda text: [message("system", text)]))
    messages = draw(system)
    if template == "plain":
        content = st.tuples(image_part, text_part).map(list)
        turns, messages = 1, []
    for _ in range(turns):
        messages += [message("user", draw(content)), message("assistant", draw(said.filter(str.strip)))]
    return messages


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Callable[[LlamaTokenizer, Template], Serve]:
    """Gives the ids that a saved and reloaded stock processor makes of messages."""
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = text | {"image_size": 32, "patch_size": 16}

    def export(tokenizer: LlamaTokenizer, template: Template) -> Serve:
        llm = text | {"model_type": "llama", "vocab_size": len(tokenizer) - 2}
        config = assembled_config(llm, vision, "mlp2x_gelu")
        folder = tmp_path_factory.mktemp("processor")
        image_processor = image_processor_of(folder, config)
        build_processor(tokenizer, config, image_processor, chat_template(template)).save_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)

        def serve(messages: list[dict[str, Any]], prompt: bool = True) -> list[int]:
            batch = processor.apply_chat_template(
                [in_parts(item) for item in messages], add_generation_prompt=prompt, tokenize=True, return_dict=True
            )
            return list(batch["input_ids"][0])

        return serve

    return export


@pytest.fixture(scope="session")
def served(request: pytest.FixtureRequest, server: Any) -> Callable[[str, str], tuple[LlamaTokenizer, Serve]]:
    """Tokenizer and stock processor by name, each made once."""
    made: dict[tuple[str, str], tuple[LlamaTokenizer, Serve]] = {}

    def get(name: str, template: str) -> tuple[LlamaTokenizer, Serve]:
        if (name, template) not in made:
            tokenizer = request.getfixturevalue(name)
            made[name, template] = (tokenizer, server(tokenizer, get_template(template)))
        return made[name, template]

    return get


def in_parts(item: dict[str, Any]) -> dict[str, Any]:
    """The stock processor opens images of messages in parts only."""
    if isinstance(item["content"], str):
        return item | {"content": [{"type": "text", "text": item["content"]}]}
    return item


def assert_served_as_trained(
    messages: list[dict[str, Any]], tokenizer: LlamaTokenizer, template: str | Template, serve: Serve
) -> None:
    """Every answer's prompt, and the whole text, have the ids that were trained."""
    encoded = encode_conversation(messages, tokenizer=tokenizer, template=template, num_image_tokens=IMAGE_TOKENS)
    ids, labels = encoded["input_ids"], encoded["labels"]
    for place, item in enumerate(messages):
        if item["role"] == "assistant":
            prompt = serve(messages[:place])
            assert ids[: len(prompt)] == prompt
            assert labels[len(prompt) - 1] == IGNORE_INDEX
            assert labels[len(prompt)] == ids[len(prompt)]
    assert serve(messages, prompt=False) == ids


@settings(max_examples=100, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("template", FITTING)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_trained_is_what_is_served(served: Any, name: str, template: str, data: st.DataObject) -> None:
    tokenizer, serve = served(name, template)
    messages = data.draw(conversations(template))
    assert_served_as_trained(messages, tokenizer, template, serve)


SPANS = st.lists(
    st.builds(Span, st.lists(st.sampled_from([*FRAGMENTS, *SPECIALS]), max_size=4).map("".join), st.booleans()),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="session")
def with_scheme(request: pytest.FixtureRequest) -> Callable[[str, str], PreTrainedTokenizerFast]:
    """A tokenizer that puts a space before the text, or, as older Llama ones, also after every special token."""
    made: dict[tuple[str, str], PreTrainedTokenizerFast] = {}

    def get(name: str, scheme: str) -> PreTrainedTokenizerFast:
        if (name, scheme) not in made:
            text = request.getfixturevalue(name).backend_tokenizer.to_str()
            assert '"prepend_scheme":"first"' in text
            backend = Tokenizer.from_str(text.replace('"prepend_scheme":"first"', f'"prepend_scheme":"{scheme}"'))
            made[name, scheme] = PreTrainedTokenizerFast(
                tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
            )
        return made[name, scheme]

    return get


@settings(max_examples=150, deadline=None)
@given(batch=st.lists(SPANS, max_size=4))
@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_looking_spans_up_gives_what_token_by_token_gives(
    with_scheme: Any, name: str, scheme: str, batch: list[list[Span]]
) -> None:
    tokenizer = with_scheme(name, scheme)
    found = encode_spans(batch, tokenizer)
    for spans, encoded in zip(batch, found, strict=True):
        try:
            ids, trained = _tokenise(spans, tokenizer)
        except EncodingError as error:
            wanted: Any = str(error)
        else:
            # A text that starts with BOS gets no second one.
            bos = [] if "".join(span.text for span in spans).startswith("<s>") else [1]
            wanted = ([*bos, *ids], [False] * len(bos) + trained)
        got = str(encoded) if isinstance(encoded, EncodingError) else (encoded[0].tolist(), encoded[1].tolist())
        assert got == wanted


SHOWN = [message("user", [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What?"}])]
HARD_SYSTEM_TEXTS = ["", "Say \"hi\", {name} 'n' \\ {{ x }} {% y %}", "Über\n中 \u2028 é\n", " spaces  "]


@pytest.mark.parametrize("template", ["vicuna_v1", "vicuna_v0", "llama_2"])
@pytest.mark.parametrize("system", HARD_SYSTEM_TEXTS)
def test_a_recipe_s_system_text_is_served(
    demo_tokenizer: LlamaTokenizer, server: Any, template: str, system: str
) -> None:
    chosen = get_template(template, system)
    messages = [*SHOWN, message("assistant", "A dog."), message("user", "Sure?"), message("assistant", "Yes.")]
    assert_served_as_trained(messages, demo_tokenizer, chosen, server(demo_tokenizer, chosen))


def test_a_system_text_beyond_the_first_plane_is_served(demo_tokenizer: LlamaTokenizer, server: Any) -> None:
    chosen = get_template("vicuna_v1", "Be kind 😀")
    messages = [*SHOWN, message("assistant", "A dog.")]
    assert_served_as_trained(messages, demo_tokenizer, chosen, server(demo_tokenizer, chosen))


def test_plain_serves_a_system_message_as_trained(served: Any) -> None:
    tokenizer, serve = served("demo_tokenizer", "plain")
    messages = [message("system", "Be brief."), *SHOWN, message("assistant", "A dog.")]
    assert_served_as_trained(messages, tokenizer, "plain", serve)


def test_plain_serves_a_recipe_s_system_text_as_trained(demo_tokenizer: LlamaTokenizer, server: Any) -> None:
    chosen = get_template("plain", "Be brief.")
    messages = [*SHOWN, message("assistant", "A dog.")]
    assert_served_as_trained(messages, demo_tokenizer, chosen, server(demo_tokenizer, chosen))


@pytest.fixture(scope="session")
def golden(shared: Path) -> list[dict[str, Any]]:
    """What LLaVA's own preprocessing makes of conversations."""
    return json.loads((shared / "llava_tokens" / "golden_tokens.json").read_text(encoding="utf-8"))["cases"]


def llava_lists(case: dict[str, Any], image_id: int) -> tuple[list[int], list[int]]:
    """LLaVA's lists with its one -200 an image expanded."""
    ids: list[int] = []
    labels: list[int] = []
    for token, label in zip(case["input_ids"], case["labels"], strict=True):
        repeat = IMAGE_TOKENS if token == -200 else 1
        ids += [image_id if token == -200 else token] * repeat
        labels += [label] * repeat
    return ids, labels


@pytest.mark.parametrize("template", ["vicuna_v1", "plain", "vicuna_v0"])
def test_it_is_llava(golden: list[dict[str, Any]], llama_tokenizer: LlamaTokenizer, template: str) -> None:
    cases = [case for case in golden if case["template"] == template.removeprefix("vicuna_")]
    assert len(cases) == (4 if template == "plain" else 9)
    for case in cases:
        ids, labels = llava_lists(case, llama_tokenizer.convert_tokens_to_ids("<image>"))
        encoded = encode_conversation(
            case["conversations"], tokenizer=llama_tokenizer, template=template, num_image_tokens=IMAGE_TOKENS
        )
        assert encoded["input_ids"] == ids, case["name"]
        if template != "vicuna_v0":
            assert encoded["labels"] == labels, case["name"]


def test_v0_trains_what_llava_trains_but_for_marks_and_role_headers(
    golden: list[dict[str, Any]], llama_tokenizer: LlamaTokenizer
) -> None:
    for case in (case for case in golden if case["template"] == "v0"):
        ids, theirs = llava_lists(case, llama_tokenizer.convert_tokens_to_ids("<image>"))
        ours = encode_conversation(
            case["conversations"], tokenizer=llama_tokenizer, template="vicuna_v0", num_image_tokens=IMAGE_TOKENS
        )["labels"]
        turns = len(case["conversations"]) // 2
        besides = [token for token, our, their in zip(ids, ours, theirs, strict=True) if our != their]
        header = ["##", "#", "▁Ass", "istant", ":"]
        assert llama_tokenizer.convert_ids_to_tokens(besides) == ["##", "#", *header * turns, "▁"], case["name"]
