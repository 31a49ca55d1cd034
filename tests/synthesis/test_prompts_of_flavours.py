"""Prompts for the teacher: the shipped ones, and prompts of the user's own."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from lora_llava.core.errors import UserError
from lora_llava.synthesis.contexts.context import Box, Context, write_context
from lora_llava.synthesis.gates.gates import REASONS, Limits, SeenSamples, check_sample
from lora_llava.synthesis.gates.retry_texts import RETRY_TEXTS
from lora_llava.synthesis.parse import parse_sample
from lora_llava.synthesis.prompts import (
    RESPONSE_SCHEMAS,
    Prompt,
    choose_request,
    load_prompts,
    prompt_hashes,
    write_messages,
)
from lora_llava.synthesis.sample import FLAVOURS, Flavour, Rejection

COCO = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_contexts" / "captions_boxes_20.jsonl"
DOG = Context("dog.jpg", ("A dog (brown) runs.", "Run, dog, run!"), (Box("dog", (0.1, 0.25, 0.333, 1.0)),))


def read_context(text: str) -> Context:
    captions, _, boxes = text.partition("\n\n")
    found = []
    for line in boxes.splitlines():
        match = re.fullmatch(r"(.+): \[(.+), (.+), (.+), (.+)\]", line)
        assert match, line
        left, top, right, bottom = map(float, match.groups()[1:])
        found.append(Box(match[1], (left, top, right, bottom)))
    return Context("example.jpg", tuple(captions.splitlines()), tuple(found))


def shipped_examples() -> Iterator[tuple[Prompt, str, str]]:
    for prompt in load_prompts().values():
        for example in prompt.examples:
            yield prompt, example.context, example.answer


def test_every_flavour_has_a_system_message_and_examples() -> None:
    prompts = load_prompts()
    assert {flavour: len(prompt.examples) for flavour, prompt in prompts.items()} == {
        "conversation": 3,
        "detail": 2,
        "reasoning": 2,
    }
    assert [flavour for flavour, prompt in prompts.items() if prompt.requests] == ["detail"]
    for prompt in prompts.values():
        for demand in (
            "see the picture|who looks at it",
            "[Nn]ever mention captions",
            "coordinate",
            "confidence|certain",
        ):
            assert re.search(demand, prompt.system), (prompt.flavour, demand)


def test_the_shipped_examples_pass_the_gates() -> None:
    seen = SeenSamples()
    for place, (prompt, context, answer) in enumerate(shipped_examples()):
        example = read_context(context)
        assert write_context(example) == context
        request = prompt.requests[0] if prompt.requests else None
        turns = parse_sample(answer, prompt.flavour, request)
        assert not isinstance(turns, Rejection), turns
        assert check_sample(example, turns, prompt.flavour, Limits()) is None
        assert seen.check(str(place), turns, prompt.flavour) is None


def test_the_shipped_examples_have_the_form_of_the_schema() -> None:
    keys: dict[Flavour, list[str]] = {
        "conversation": ["turns"],
        "detail": ["description"],
        "reasoning": ["question", "answer"],
    }
    for prompt, _, answer in shipped_examples():
        value = json.loads(answer)
        assert list(value) == keys[prompt.flavour]
        assert all(list(turn) == ["question", "answer"] for turn in value.get("turns", []))


def test_every_request_passes_the_gates() -> None:
    requests = load_prompts()["detail"].requests
    assert len(set(requests)) == len(requests) == 12
    context, answer = next((context, answer) for prompt, context, answer in shipped_examples() if prompt.requests)
    for request in requests:
        turns = parse_sample(answer, "detail", request)
        assert not isinstance(turns, Rejection)
        assert turns[0].text == request
        assert check_sample(read_context(context), turns, "detail", Limits()) is None


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_messages_are_the_system_message_examples_and_the_context(flavour: Flavour) -> None:
    prompt = load_prompts()[flavour]
    messages = write_messages(prompt, DOG)
    assert [message["role"] for message in messages] == [
        "system",
        *["user", "assistant"] * len(prompt.examples),
        "user",
    ]
    assert messages[0]["content"] == prompt.system
    assert messages[1]["content"] == prompt.examples[0].context
    assert messages[2]["content"] == prompt.examples[0].answer
    assert messages[-1]["content"] == "A dog (brown) runs.\nRun, dog, run!\n\ndog: [0.1, 0.25, 0.333, 1.0]"


def test_schemas_are_strict() -> None:
    turn = {
        "type": "object",
        "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
        "required": ["question", "answer"],
        "additionalProperties": False,
    }
    turns = {
        "type": "object",
        "properties": {"turns": {"type": "array", "items": turn}},
        "required": ["turns"],
        "additionalProperties": False,
    }
    description = {
        "type": "object",
        "properties": {"description": {"type": "string"}},
        "required": ["description"],
        "additionalProperties": False,
    }
    for flavour, schema in (("conversation", turns), ("detail", description), ("reasoning", turn)):
        assert RESPONSE_SCHEMAS[flavour] == {  # type: ignore[index]
            "type": "json_schema",
            "json_schema": {"name": flavour, "strict": True, "schema": schema},
        }


def test_requests_depend_on_the_task_alone() -> None:
    prompts = load_prompts()
    drawn = [choose_request(prompts["detail"], f"{n:012}-detail-0") for n in range(1200)]
    assert drawn == [choose_request(prompts["detail"], f"{n:012}-detail-0") for n in range(1200)]
    counts = Counter(drawn)
    assert set(counts) == set(prompts["detail"].requests)
    assert min(counts.values()) > 60
    assert choose_request(prompts["reasoning"], "000000000000-reasoning-0") is None
    three = Prompt("detail", "s", (), ("a", "b", "c"))
    assert [choose_request(three, name) for name in ("x-0", "x-1", "x-2", "x-3")] == ["b", "b", "a", "b"]


def test_different_prompts_have_different_hashes(tmp_path: Path) -> None:
    shipped = prompt_hashes(load_prompts())
    assert shipped == {flavour: prompt.hash for flavour, prompt in load_prompts().items()}
    assert {len(each) for each in shipped.values()} == {64}
    for name in ("system.txt", "requests.txt", "example_2.context.txt", "example_2.answer.json"):
        folder = copy_of_detail(tmp_path / name)
        file = folder / "detail" / name
        file.write_text(file.read_text().replace("e", "E", 1) if name.endswith("txt") else '{"description": "A."}')
        own = prompt_hashes(load_prompts(folder))
        assert own["detail"] != shipped["detail"]
        assert {**own, "detail": ""} == {**shipped, "detail": ""}
    assert Prompt("detail", "a", (), ("b",)).hash == hashlib.sha256(b'["detail", "a", [], ["b"]]').hexdigest()


def copy_of_detail(folder: Path) -> Path:
    shutil.copytree(str(resources.files("lora_llava.synthesis").joinpath("prompts", "detail")), folder / "detail")
    return folder


def test_own_prompts_replace_the_shipped_ones(tmp_path: Path) -> None:
    own = tmp_path / "reasoning"
    own.mkdir()
    (own / "system.txt").write_text("\ufeffAsk why.\n", encoding="utf-8")
    (own / "README.md").write_text("Notes are left alone.")
    prompts = load_prompts(tmp_path)
    assert prompts["reasoning"] == Prompt("reasoning", "Ask why.", ())
    assert write_messages(prompts["reasoning"], Context("a.jpg", ("A.",))) == [
        {"role": "system", "content": "Ask why."},
        {"role": "user", "content": "A."},
    ]
    assert {**prompts, "reasoning": None} == {**load_prompts(), "reasoning": None}
    for number in (10, 9):
        (own / f"example_{number}.context.txt").write_text(f"Image {number}.")
        (own / f"example_{number}.answer.json").write_text(json.dumps({"question": "Why?", "answer": f"So {number}."}))
    assert [example.context for example in load_prompts(tmp_path)["reasoning"].examples] == [
        "Image 9.",
        "Image 10.",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("system.txt", None, "{folder}/detail/system.txt is missing; copy the shipped file and edit it"),
        (
            "system.txt",
            " \n",
            "{folder}/detail/system.txt is empty; write it, or remove the folder to use the shipped prompt",
        ),
        ("requests.txt", None, "{folder}/detail/requests.txt is missing; copy the shipped file and edit it"),
        (
            "example_1.context.txt",
            None,
            "{folder}/detail/example_1.context.txt is missing; add it: an example needs both files",
        ),
        (
            "example_1.answer.json",
            None,
            "{folder}/detail/example_1.answer.json is missing; add it: an example needs both files",
        ),
        (
            "example_1.answer.json",
            '{"width": 1, "height": 2}',
            "{folder}/detail/example_1.answer.json cannot be used: unreadable (it contains no description, "
            "or several); write it like the shipped examples",
        ),
        (
            "example1.context.txt",
            "A.",
            "{folder}/detail/example1.context.txt is not a prompt file; rename it to one of requests.txt, "
            "system.txt, example_N.context.txt and example_N.answer.json, or remove it",
        ),
    ],
)
def test_invalid_prompts_are_errors(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    file = copy_of_detail(tmp_path) / "detail" / name
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(UserError, match=f"^{re.escape('prompts: ' + message.format(folder=tmp_path))}$"):
        load_prompts(tmp_path)


def test_prompts_must_be_utf8(tmp_path: Path) -> None:
    (copy_of_detail(tmp_path) / "detail" / "system.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"^prompts: .*/detail/system.txt cannot be read: 'utf-8' codec"):
        load_prompts(tmp_path)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], "contains no folder of a flavour; name folders conversation, detail, reasoning, one or more, as in "),
        (
            ["detail", "reasonning"],
            'contains an unknown folder "reasonning" (did you mean "reasoning"?); name folders conversation, ',
        ),
    ],
)
def test_a_folder_without_flavours_is_an_error(tmp_path: Path, folders: list[str], message: str) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"^{re.escape(f'prompts: {tmp_path} {message}')}"):
        load_prompts(tmp_path)
    with pytest.raises(UserError, match=r"missing contains no folder of a flavour"):
        load_prompts(tmp_path / "missing")


@pytest.mark.skipif(not COCO.exists(), reason="the twenty COCO contexts are not in this repository")
def test_real_contexts_appear_in_the_prompt_as_in_their_file() -> None:
    rows = [json.loads(line) for line in COCO.read_text().splitlines()]
    assert len(rows) == 20
    for row in rows:
        boxes = tuple(Box(each["category"], tuple(each["bbox"])) for each in row["instances"])
        context = Context(row["image"], tuple(row["captions"]), boxes)
        lines = [f"{each['category']}: {each['bbox']}" for each in row["instances"]]
        for prompt in load_prompts().values():
            content = write_messages(prompt, context)[-1]["content"]
            assert content == "\n".join(row["captions"]) + ("\n\n" + "\n".join(lines) if lines else "")


def test_retry_texts_are_unchanged() -> None:
    """The ledger's keys depend on these texts: a change would make resumed sets query the teacher again."""
    assert set(RETRY_TEXTS) == set(REASONS)
    first = dict(list(RETRY_TEXTS.items())[:20])  # later ones are at the end
    digest = hashlib.sha256(json.dumps(first).encode("ascii")).hexdigest()
    assert digest == "bf595d775e26022eefa62fd8a9a0fd232af8bb98057a9ad42cdfff664874ffe2"
