"""Language models' own chat templates, and named ones with tokens of their own: what is trained is what is served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, LlavaConfig, PreTrainedTokenizerFast

from lora_llava.core.errors import UserError
from lora_llava.data import EncodingError, encode_conversation, encode_prompt
from lora_llava.data.templates.chat_template import ChatTemplate, own_template, saved_text
from lora_llava.data.templates.named_templates import TEMPLATES, chat_template, get_template
from lora_llava.data.templates.resolve_template import resolve_template
from lora_llava.data.tokens import leading_ids, stop_of
from lora_llava.model.base import build_processor
from lora_llava.model.families.tower_families import image_processor_of

TRL = Path(trl.__file__).parent / "chat_templates"
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2-Instruct's chat template, which fails on lists of parts."""
OWN = [
    "smollm2",
    "qwen2_5",
    "qwen3",
    "qwen3_instruct_2507",
    "llama3",
    "llama3_1",
    "llama3_2",
    "phi3",
    "phi3_5",
    "gemma3",
]
"""Templates of language models: SmolLM2's, and those that TRL ships."""
MARKERS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<|eot_id|>", "<|start_header_id|>"]
MARKERS += ["<|end_header_id|>", "<|begin_of_text|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
MARKERS += ["<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "</s>"]
IMAGE_TOKENS = 4
FRAGMENTS = [
    "a",
    " ",
    "  ",
    "\n",
    "\n\n",
    "é",
    "中",
    "😀",
    "{}",
    "{{ x }}",
    "'",
    '"',
    "\\",
    "the",
    "user",
    "assistant",
    "<think",
    "0",
]
Serve = Callable[..., list[int]]


GPT_2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA_3 += r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_pairs(pattern: str) -> Tokenizer:
    """Train a byte-level BPE that splits words by a pattern."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    texts = [file.read_text(encoding="utf-8") for file in sorted(TRL.glob("*.jinja"))[:20]]
    tokenizer.train_from_iterator([*texts, "\n\n" * 50], trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Tokenizers that have a BOS and do not add it, as SmolLM2's, and that add it, as Llama 3's."""
    found = {}
    for name, pattern in (("gpt_2", GPT_2), ("qwen", LLAMA_3), ("llama_3", LLAMA_3)):
        backend, bos = byte_pairs(pattern), "<|begin_of_text|>"
        backend.add_special_tokens([*MARKERS, "<image>", "<pad>"])
        if name == "llama_3":
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
            )
        found[name] = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=bos, eos_token="<|endoftext|>", pad_token="<pad>"
        )
    return found


def text_of(name: str) -> str:
    return SMOLLM2 if name == "smollm2" else (TRL / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Serve]:
    """Gives the ids that a saved and reloaded stock processor makes of messages."""

    def export(tokenizer: PreTrainedTokenizerFast, template: Any) -> Serve:
        image_id = tokenizer.convert_tokens_to_ids("<image>")
        config = LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16},
            image_token_index=image_id,
        )
        folder = tmp_path_factory.mktemp("processor")
        images = image_processor_of(folder, config)
        build_processor(tokenizer, config, images, chat_template(template)).save_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)

        def serve(messages: list[dict[str, Any]], prompt: bool) -> list[int]:
            parts = [item | {"content": as_parts(item["content"])} for item in messages]
            batch = processor.apply_chat_template(parts, add_generation_prompt=prompt, tokenize=True, return_dict=True)
            return list(batch["input_ids"][0])

        return serve

    return export


def as_parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Messages of one to three turns with images anywhere in the questions."""
    said = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)
    image = {"type": "image", "image": Image.new("RGB", (8, 8))}
    part = st.one_of(said.map(lambda text: {"type": "text", "text": text}), st.just(image))
    messages: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 3))):
        question = draw(st.one_of(said, st.lists(part, min_size=1, max_size=4)))
        answer = draw(said.filter(lambda text: text.strip() and not text[0].isspace()))
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


@pytest.fixture(scope="session")
def served(tokenizers: Any, server: Any) -> Callable[[str, str], tuple[Any, Any, Serve]]:
    """Tokenizer, template and stock processor by name, each made once."""
    made: dict[tuple[str, str], Any] = {}

    def get(kind: str, name: str) -> tuple[Any, Any, Serve]:
        if (kind, name) not in made:
            tokenizer = tokenizers[kind]
            template = get_template(name) if name in TEMPLATES else own_template(tokenizer, text_of(name))
            made[kind, name] = (tokenizer, template, server(tokenizer, template))
        return made[kind, name]

    return get


NAMES = [*OWN, "chatml", "qwen", "llama_3", "phi_3"]
ENDS_IN_TWO_BREAKS = ["qwen3", "llama3", "llama3_1", "llama3_2", "llama_3"]
"""Templates whose prompt ends in two line breaks, which GPT-2's pattern splits differently before a letter."""


@settings(max_examples=10, deadline=None)
@given(messages=conversations())
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in NAMES for kind in ("qwen", "llama_3")),
        *((name, "gpt_2") for name in NAMES if name not in ENDS_IN_TWO_BREAKS),
    ],
)
def test_what_is_trained_is_what_is_served(served: Any, name: str, kind: str, messages: list[dict[str, Any]]) -> None:
    tokenizer, template, serve = served(kind, name)
    encoded = encode_conversation(messages, tokenizer=tokenizer, template=template, num_image_tokens=IMAGE_TOKENS)
    ids, labels = encoded["input_ids"], encoded["labels"]
    stop = tokenizer.convert_tokens_to_ids(template.stop)
    for place, item in enumerate(messages):
        if item["role"] == "assistant":
            prompt = serve(messages[:place], True)
            assert ids[: len(prompt)] == prompt
            assert labels[len(prompt) - 1] == -100
            trained = labels[len(prompt) : labels.index(stop, len(prompt)) + 1]
            assert tokenizer.decode(trained[:-1]).strip() == item["content"].strip()
    assert serve(messages, False) == ids
    asked = encode_prompt(messages[:-1], tokenizer=tokenizer, template=template, num_image_tokens=IMAGE_TOKENS)
    assert asked == serve(messages[:-1], True)


@pytest.mark.parametrize("name", ENDS_IN_TWO_BREAKS)
def test_a_prompt_that_the_answer_would_change_is_refused(tokenizers: Any, name: str) -> None:
    template = get_template(name) if name in TEMPLATES else own_template(tokenizers["gpt_2"], text_of(name))
    with pytest.raises(EncodingError, match="which the tokenizer splits differently before an answer"):
        encode_conversation(TURNS, tokenizer=tokenizers["gpt_2"], template=template, num_image_tokens=1)


TURNS = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes, it is."},
]


@pytest.mark.parametrize("name", [name for name in OWN if (TRL / f"{name}_training.jinja").is_file()])
def test_trained_text_is_that_of_trl_s_generation_mask(tokenizers: Any, name: str) -> None:
    tokenizer = tokenizers["qwen"]
    template = own_template(tokenizer, text_of(name))
    text = (TRL / f"{name}_training.jinja").read_text(encoding="utf-8")
    judged = tokenizer.apply_chat_template(
        TURNS,
        chat_template=text,
        return_dict=True,
        return_assistant_tokens_mask=True,
        strftime_now=lambda _: "26 Jul 2024",
    )
    theirs = [i for i, mask in zip(judged["input_ids"], judged["assistant_masks"], strict=True) if mask]
    ours = encode_conversation(TURNS, tokenizer=tokenizer, template=template, num_image_tokens=1)["labels"]
    shown = tokenizer.decode([i for i in ours if i != -100])
    # The empty thinking block is part of TRL's answer and, thinking being off, of our prompt. TRL also trains line
    # breaks around an answer, and an EOS behind the last.
    expected = tokenizer.decode(theirs).replace("<think>\n\n</think>\n\n", "").removesuffix("<|endoftext|>")
    assert [part.strip() for part in expected.split(template.stop)] == shown.split(template.stop)


@pytest.mark.parametrize(
    ("named", "own", "start"),
    [
        ("chatml", "smollm2", ""),
        ("qwen", "qwen2_5", ""),
        ("llama_3", "llama3", "<|begin_of_text|>"),
        ("phi_3", "phi3", ""),
    ],
)
def test_named_templates_write_what_the_models_own_write(tokenizers: Any, named: str, own: str, start: str) -> None:
    tokenizer = tokenizers["qwen"]
    messages = [{"role": "system", "content": "Be brief."}, *TURNS[:3]]
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=text_of(own), tokenize=False, add_generation_prompt=True
    )
    ours = tokenizer.apply_chat_template(
        messages, chat_template=chat_template(get_template(named)), tokenize=False, add_generation_prompt=True
    )
    assert start + ours == theirs


def test_a_system_text_of_the_recipe_is_trained_and_served(tokenizers: Any, server: Any) -> None:
    tokenizer = tokenizers["qwen"]
    template = own_template(tokenizer, SMOLLM2, 'Say "hi", {{ x }} 中')
    serve = server(tokenizer, template)
    ids = encode_conversation(TURNS, tokenizer=tokenizer, template=template, num_image_tokens=1)["input_ids"]
    assert serve(TURNS, False) == ids
    assert tokenizer.decode(ids).startswith('<|im_start|>system\nSay "hi", {{ x }} 中<|im_end|>\n<|im_start|>user\n')
    own = [{"role": "system", "content": "Mine"}, *TURNS]
    assert tokenizer.decode(serve(own, True)).startswith("<|im_start|>system\nMine<|im_end|>")


def test_the_date_and_the_thinking_block_are_fixed(tokenizers: Any) -> None:
    tokenizer = tokenizers["qwen"]
    dated = own_template(tokenizer, text_of("llama3_2"))
    assert "Today Date: 26 Jul 2024" in dated.render(TURNS[:1], True)
    thinking = own_template(tokenizer, text_of("qwen3"))
    assert thinking.render(TURNS[:1], True).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert thinking.render(TURNS, False).count("<think>\n\n</think>\n\n") == 2  # TRL's: earlier turns keep theirs


def test_a_saved_template_is_taken_as_it_is(tokenizers: Any, tmp_path: Path) -> None:
    tokenizer = tokenizers["qwen"]
    first = own_template(tokenizer, text_of("qwen3"), "Be brief.")
    (tmp_path / "chat_template.jinja").write_text(first.text, encoding="utf-8")
    assert own_template(tokenizer, saved_text(tmp_path) or "", "Be brief.") == first
    assert resolve_template("auto", "Be brief.", tokenizer, first.text, "qwen3") == first


LISTS = (  # as in llava-hf's and most vision-language models': contents are lists
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ END }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_of_lists_is_trained_and_served(tokenizers: Any, server: Any) -> None:
    tokenizer = tokenizers["qwen"]
    template = own_template(tokenizer, LISTS.replace("END", "'<|im_end|>\n'"))
    assert template.listed
    serve = server(tokenizer, template)
    image = {"type": "image", "image": Image.new("RGB", (8, 8))}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}, *TURNS[1:]]
    ids = encode_conversation(messages, tokenizer=tokenizer, template=template, num_image_tokens=IMAGE_TOKENS)[
        "input_ids"
    ]
    assert ids == serve(messages, False)
    assert tokenizer.decode(ids).startswith("<|im_start|>user\n<image><image><image><image>\nWhat?<|im_end|>\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LISTS.replace("END", "' '"), "ends an answer with ' ', which is not a token of its vocabulary"),
        (
            SMOLLM2.replace("message['content']", "(message['content'] if loop.last else 'x')"),
            "writes what comes before answer 1 differently once an answer follows",
        ),
        (SMOLLM2.replace("message['content']", "message['content'][:9]"), "changes or drops answers"),
        ("{{ raise_exception('no chat') }}", "refuses it: no chat"),
        ("{{ messages[0]", "refuses it: "),
    ],
)
def test_templates_that_cannot_be_trained_are_one_line(tokenizers: Any, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_template("auto", None, tokenizers["qwen"], text, "qwen2")
    assert str(caught.value).startswith("data.template is auto, but ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_template_needs_a_name_unless_it_is_vicuna(tokenizers: Any, letters: Any) -> None:
    with pytest.raises(UserError, match="the language model has no chat template; name the one that it was trained"):
        resolve_template("auto", None, tokenizers["qwen"], None, "qwen2")
    assert resolve_template("auto", None, letters, None, "llama") == get_template("vicuna_v1")
    for known in ("vicuna_v1", "llama_2", "vicuna_v0"):
        text = chat_template(get_template(known))
        assert resolve_template("auto", None, letters, text, "llama") == get_template(known)
    assert isinstance(resolve_template("auto", None, tokenizers["qwen"], SMOLLM2, "llama"), ChatTemplate)


def test_a_conversation_that_the_template_refuses_is_a_bad_row(tokenizers: Any) -> None:
    tokenizer = tokenizers["qwen"]
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template = own_template(tokenizer, strict + SMOLLM2)
    with pytest.raises(EncodingError, match="chat template refuses it: System role not supported"):
        encode_conversation(
            [{"role": "system", "content": "x"}, *TURNS], tokenizer=tokenizer, template=template, num_image_tokens=1
        )
    with pytest.raises(UserError, match="System role not supported"):
        own_template(tokenizer, strict + SMOLLM2, "Be brief.")


def test_typed_control_tokens_stay_text(tokenizers: Any) -> None:
    tokenizer = tokenizers["qwen"]
    template = own_template(tokenizer, SMOLLM2)
    messages = [{"role": "user", "content": "Type <|im_end|>"}, {"role": "assistant", "content": "<|im_end|> ends it"}]
    encoded = encode_conversation(messages, tokenizer=tokenizer, template=template, num_image_tokens=1)
    assert encoded["input_ids"].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3
    assert tokenizer.decode([i for i in encoded["labels"] if i != -100]) == "<|im_end|> ends it<|im_end|>"


def test_answers_stop_at_the_template_s_token_and_at_eos(tokenizers: Any) -> None:
    tokenizer = tokenizers["llama_3"]
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>")}
    assert stop_of(tokenizer, "<|im_end|>").ids == list(ids.values())
    assert stop_of(tokenizer, "\n###", "###") == ([ids["<|endoftext|>"]], "###")
    assert leading_ids(tokenizer) == [tokenizer.bos_token_id]
    assert leading_ids(tokenizers["qwen"]) == []
