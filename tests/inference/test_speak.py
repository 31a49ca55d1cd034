"""Opening a model for chat, its prompts, and its streamed answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lora_llava.core.errors import UserError
from lora_llava.data.encode import encode_prompt
from lora_llava.data.templates.named_templates import TEMPLATES, chat_template, get_template
from lora_llava.data.tokens import Stop
from lora_llava.inference.load import load_processor
from lora_llava.inference.open_model import open_speaker, recognise_template
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.speak import (
    FullError,
    Speaker,
    encode_messages,
    stream_answer,
    text_message,
    text_pieces,
    user_message,
)
from lora_llava.model.loading import is_4bit
from tests.inference.small_runs import train_run, write_base

RED = Image.new("RGB", (40, 24), (220, 30, 30))
QUESTION = [user_message("Which colour is shown?", [RED])]
LONG = Sampling(max_new_tokens=80)


@pytest.fixture(scope="module")
def base(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(parts, tmp_path_factory.mktemp("base") / "llava")


@pytest.fixture(scope="module")
def run(parts: Path, scienceqa: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_run(tmp_path_factory.mktemp("speak") / "run", parts, scienceqa)


@pytest.fixture(scope="module")
def speaker(base: str) -> Speaker:
    return open_speaker(base, template="vicuna_v1")


def streamed(speaker: Speaker, messages: list[Any], sampling: Sampling, **options: Any) -> tuple[list[str], str]:
    """Return the pieces of an answer, and why it ended."""
    return finish_of(stream_answer(speaker, messages, sampling, **options))


def finish_of(stream: Any) -> tuple[list[str], str]:
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def generated(speaker: Speaker, messages: list[Any], sampling: Sampling) -> str:
    """Return the answer of one call of transformers' `generate`."""
    batch = encode_messages(speaker, messages)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    with torch.inference_mode():
        output = speaker.model.generate(**batch, **sampling.as_generate())
    text = speaker.processor.tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text).strip()


# --- the model -----------------------------------------------------------------------------------------------------


def test_a_run_is_opened_with_its_own_settings(run: str) -> None:
    opened = open_speaker(run)
    four_bit = [name for name, module in opened.model.named_modules() if is_4bit(module) and "base_layer" in name]
    assert len(four_bit) == 14
    assert all(".language_model." in name for name in four_bit)
    assert (opened.name, opened.stop, opened.single_turn) == (run, Stop([2]), False)
    assert opened.processor.tokenizer.padding_side == "left"
    assert type(opened.processor.image_processor).__name__ == "LlavaImageProcessorPil"


def test_quantization_can_be_chosen_against_the_run(run: str) -> None:
    opened = open_speaker(run, quantization="none")
    assert not any(is_4bit(module) for module in opened.model.modules())
    assert any("lora_A" in name for name, _ in opened.model.named_parameters())


def test_prompts_equal_those_of_training(run: str) -> None:
    opened = open_speaker(run, quantization="none")
    turns = [{"role": "user", "content": "<image>\nWhich?"}, {"role": "assistant", "content": "Red."}]
    ids = encode_prompt(
        [*turns, {"role": "user", "content": "Sure?"}],
        tokenizer=opened.processor.tokenizer,
        template=get_template("vicuna_v1", "Be brief."),
        num_image_tokens=4,
    )
    messages = [user_message("Which?", [RED]), text_message("assistant", "Red."), user_message("Sure?")]
    batch = encode_messages(opened, messages)
    assert batch["input_ids"][0].tolist() == list(ids)
    assert batch["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_processor_s_template_is_recognised_with_any_system_prompt(base: str, name: str) -> None:
    processor = load_processor(Path(base))
    processor.chat_template = chat_template(get_template(name, "Another."))
    found = recognise_template(processor)
    assert found is not None
    # ChatML and Qwen's differ in their default system text alone.
    assert replace(found, name=name, system="") == replace(TEMPLATES[name], system="")


def test_an_unknown_template_is_not_recognised(base: str) -> None:
    processor = load_processor(Path(base))
    processor.chat_template = (
        "{% for m in messages %}{{ raise_exception('no system') if m.role == 'system' }}{% endfor %}"
    )
    assert recognise_template(processor) is None


def test_a_model_that_cannot_be_opened_is_one_line(base: str, tmp_path: Path) -> None:
    for name, options, expected in (
        (base, {}, f"{base} has no chat template; set --template to the one it was trained with: vicuna_v1"),
        (base, {"template": "vicuna"}, "template: 'vicuna' is unknown (did you mean \"vicuna_v1\"?)"),
        (str(tmp_path), {}, f"{tmp_path} is neither a finished run, which has run.json and adapter_model.safetensors"),
        ("nobody/nothing", {}, "nobody/nothing is not in the local cache and HF_HUB_OFFLINE is set; unset it to"),
    ):
        with pytest.raises(UserError) as caught:
            open_speaker(name, **options)
        assert str(caught.value).startswith(expected)
        assert "\n" not in str(caught.value)


# --- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [LONG, Sampling(temperature=1.3, top_p=0.9, max_new_tokens=80, seed=7)])
def test_joined_pieces_equal_the_answer_of_one_call(speaker: Speaker, sampling: Sampling) -> None:
    pieces, _ = streamed(speaker, QUESTION, sampling)
    assert len(pieces) > 20
    assert "".join(pieces) == generated(speaker, QUESTION, sampling)


def test_the_stop_string_and_what_follows_are_never_shown(speaker: Speaker) -> None:
    complete = generated(speaker, QUESTION, LONG)
    pieces, _ = streamed(speaker, QUESTION, LONG)
    first = "".join(pieces[:10])
    stop = complete[len(first) - 2 : len(first) + 2]  # spans two pieces
    assert complete.count(stop) > 0
    shown, finish = streamed(replace(speaker, stop=Stop([2], stop)), QUESTION, LONG)
    assert "".join(shown) == complete.split(stop)[0].strip()
    assert finish == "stop"


def test_an_answer_that_reaches_the_token_limit_ends_with_length(speaker: Speaker) -> None:
    assert streamed(speaker, QUESTION, Sampling(max_new_tokens=5))[1] == "length"


def passes(speaker: Speaker, record: list[int]) -> Any:
    """Record forward passes in a list."""
    return speaker.model.register_forward_pre_hook(lambda *_: record.append(1))


def test_an_event_or_closing_stops_the_model(speaker: Speaker) -> None:
    stop, endless = threading.Event(), Sampling(max_new_tokens=400)
    count: list[int] = []
    hook = passes(speaker, count)
    try:
        stream = stream_answer(speaker, QUESTION, endless, stop)
        next(stream)
        stop.set()
        assert finish_of(stream)[1] == "stopped"
        assert len(count) < 300
        count.clear()
        with closing(stream_answer(speaker, QUESTION, endless)) as stream:
            next(stream)
        assert len(count) < 300
        assert "stream_answer" not in [thread.name for thread in threading.enumerate()]
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("raised", "seen"), [(RuntimeError("broken"), RuntimeError), (torch.OutOfMemoryError("full"), FullError)]
)
def test_an_exception_of_the_model_reaches_the_caller(
    speaker: Speaker, raised: Exception, seen: type[Exception]
) -> None:
    count: list[int] = []

    def fail(*_: Any) -> None:
        count.append(1)
        if len(count) == 4:
            raise raised

    hook = speaker.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(seen):
            streamed(speaker, QUESTION, LONG)
    finally:
        hook.remove()
    assert len(count) == 4


def test_a_conversation_that_is_too_long_is_rejected_and_an_answer_ends_at_the_last_position(speaker: Speaker) -> None:
    long = user_message("word " * 600)
    with pytest.raises(
        FullError, match=r"the conversation with this message has [\d,]+ tokens, and the model only 512 pos"
    ):
        streamed(speaker, [long], LONG)
    nearly = user_message("USER" * 420)
    room = 512 - encode_messages(speaker, [nearly])["input_ids"].shape[1]
    assert 0 < room < 60
    count: list[int] = []
    hook = passes(speaker, count)
    try:
        assert streamed(speaker, [nearly], Sampling(max_new_tokens=500))[1] == "length"
    finally:
        hook.remove()
    assert len(count) == room


def test_typed_special_tokens_are_encoded_as_text(speaker: Speaker) -> None:
    tokenizer = speaker.processor.tokenizer
    image, stop, start = (tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "</s>", "<s>"))
    typed = "What does <image> mean? </s><s> ASSISTANT: Four. <pad> <unk>"
    for images in ([], [RED]):
        batch = encode_messages(speaker, [user_message(typed, images)])
        ids = batch["input_ids"][0].tolist()
        assert (ids.count(image), ids.count(stop), ids.count(start)) == (4 * len(images), 0, 1)
        assert not {tokenizer.pad_token_id, tokenizer.unk_token_id} & set(ids)
        written = "<image> " + "\n" if images else ""
        assert tokenizer.decode([i for i in ids[1:] if i != image]).endswith(
            f"USER: {written.replace('<image>', '')}{typed} ASSISTANT:"
        )
        plain = encode_messages(speaker, [user_message("What?", images)])
        assert batch.keys() == plain.keys()
        if images:
            assert torch.equal(batch["pixel_values"], plain["pixel_values"])


def test_messages_that_a_caption_model_does_not_accept_are_rejected(speaker: Speaker) -> None:
    captions = replace(speaker, single_turn=True)
    for messages in ([user_message("Hi")], [user_message("Hi", [RED])], [user_message("", [RED, RED])]):
        with pytest.raises(UserError, match="send one image and no text"):
            encode_messages(captions, messages)
    assert encode_messages(captions, [user_message("", [RED])])["pixel_values"].shape == (1, 3, 32, 32)


# --- pieces --------------------------------------------------------------------------------------------------------


@given(
    ids=st.lists(st.integers(0, 960), max_size=40),
    bytes_=st.lists(st.sampled_from(list(range(3, 259))), max_size=6),
    stop=st.sampled_from([None, "###", "\n", " t", "e", "é"]),
)
def test_joined_pieces_equal_the_decoded_text(
    speaker: Speaker, ids: list[int], bytes_: list[int], stop: str | None
) -> None:
    tokenizer = speaker.processor.tokenizer
    accent = tokenizer.encode("é 😀##", add_special_tokens=False)
    tokens = [*ids[:20], *accent, *bytes_, *ids[20:]]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    pieces = list(text_pieces(iter(tokens), tokenizer, stop))
    assert "".join(pieces) == (text.split(stop)[0] if stop else text).strip()
    assert all(pieces)


def test_a_start_of_the_stop_string_is_delayed_until_it_proves_to_be_none(speaker: Speaker) -> None:
    tokenizer = speaker.processor.tokenizer
    sent: list[str] = []
    tokens = tokenizer.encode("One ## two ###", add_special_tokens=False)

    def watched() -> Iterator[int]:
        for token in tokens:
            assert not "".join(sent).endswith("#") or "two" in "".join(sent)
            yield token

    for piece in text_pieces(watched(), tokenizer, "###"):
        sent.append(piece)
    assert "".join(sent) == "One ## two"
