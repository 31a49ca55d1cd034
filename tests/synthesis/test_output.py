"""A set's files hold every task once, say what was left out and why, and are whole or not there."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import DatasetCard
from hypothesis import example, given
from hypothesis import strategies as st

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import Conversation, Turn
from lora_llava.data.files.reading import iterate_rows
from lora_llava.data.sources import open_source
from lora_llava.demo.dataset import build_demo_contexts
from lora_llava.inference.answer_store import AnswerStore
from lora_llava.inference.budget import Budget
from lora_llava.pages.preview_samples import escape_hidden
from lora_llava.publishing.leaks import scan
from lora_llava.recipe import load_recipe
from lora_llava.recipe.generate_schema import ContextsSection, GenerateRecipe, TeacherSection
from lora_llava.synthesis.contexts.context_builder import ContextReport
from lora_llava.synthesis.contexts.reading_contexts import Contexts, read_contexts
from lora_llava.synthesis.dataset_card import size_category, write_card
from lora_llava.synthesis.gates.gates import REASONS
from lora_llava.synthesis.generation import LEDGER_FILE
from lora_llava.synthesis.output import write_set
from lora_llava.synthesis.pipeline import Maker, Result, Settings
from lora_llava.synthesis.prompts import load_prompts, prompt_hashes
from lora_llava.synthesis.sample import FLAVOURS, Flavour, Rejection, Task
from lora_llava.synthesis.tasks import plan_tasks
from lora_llava.synthesis.teachers.demo_teacher import NAME, answer_by_rules

FILES = ["README.md", "gallery.html", "instruct.json", "rejected.jsonl", "summary.json"]
DEMO = TeacherSection(backend="demo")
SERVER = TeacherSection(url="http://localhost:8000/v1", model="owner/model")


def contexts(count: int = 4) -> Contexts:
    known = json.dumps([["A dog."], [["dog", 0.1, 0.2, 0.5, 0.6]]]).encode()
    report = ContextReport(images=count, captions=count, boxes=count)
    return Contexts({f"{number}.jpg": known for number in range(count)}, report)


def recipe(teacher: TeacherSection = SERVER, **section: Any) -> GenerateRecipe:
    return GenerateRecipe(
        output_dir="x", contexts=ContextsSection(**({"contexts": "c.jsonl"} | section)), teacher=teacher
    )


def task(place: int, flavour: Flavour = "conversation") -> Task:
    return Task(f"{place}-{flavour}-0", place, flavour, 0)


def said(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts))


def told(*reasons: str) -> tuple[Rejection, ...]:
    return tuple(Rejection(reason, f"about {reason}") for reason in reasons)


RESULTS = [
    Result(task(0), "accepted", said("What?", "A dog.", "Where, then?", "On the left"), told("cut off"), model="m"),
    Result(task(0, "detail"), "accepted", said("Describe it.", "Ein Hündchen \u2028 «links»."), model="m"),
    Result(task(1), "accepted", said("what", "a DOG!", "Where then?", "On the  left."), told("too short"), model="m"),
    Result(task(1, "reasoning"), "rejected", rejections=told("cut off", "no answer", "cut off"), model="m"),
    Result(task(2, "reasoning"), "failed", reason="HTTP 500"),
    Result(task(3), "not asked"),
]


def write(folder: Path, results: Any = RESULTS, teacher: TeacherSection = SERVER, **about: Any) -> dict[str, Any]:
    return write_set(folder, results=results, contexts=contexts(), recipe=recipe(teacher), about=about)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text(encoding="utf-8").split("\n") if line]


def test_rows_are_llava_s(tmp_path: Path) -> None:
    write(tmp_path)
    assert json.loads((tmp_path / "instruct.json").read_text(encoding="utf-8")) == [
        {
            "id": "0-conversation-0", "image": "0.jpg", "category": "conversation",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."},
                {"from": "human", "value": "Where, then?"}, {"from": "gpt", "value": "On the left"},
            ],
        },
        {
            "id": "0-detail-0", "image": "0.jpg", "category": "detail",
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe it."},
                {"from": "gpt", "value": "Ein Hündchen \u2028 «links»."},
            ],
        },
    ]  # fmt: skip
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES


def test_our_own_reader_takes_the_rows(tmp_path: Path) -> None:
    write(tmp_path)
    rows = list(open_source(tmp_path / "instruct.json").read())
    assert rows == [
        Conversation(
            "0-conversation-0",
            said("<image>\nWhat?", "A dog.", "Where, then?", "On the left"),
            ("0.jpg",),
            {"type": "conversation"},
        ),
        Conversation(
            "0-detail-0", said("<image>\nDescribe it.", "Ein Hündchen \u2028 «links»."), ("0.jpg",), {"type": "detail"}
        ),
    ]


def test_what_is_left_out_is_listed(tmp_path: Path) -> None:
    write(tmp_path)
    of = [(0, "conversation"), (1, "conversation"), (1, "reasoning"), (2, "reasoning"), (3, "conversation")]
    heads = [{"task_id": f"{place}-{name}-0", "flavour": name, "image": f"{place}.jpg"} for place, name in of]
    assert lines_of(tmp_path) == [
        heads[0] | {"attempt": 0, "reason": "cut off", "detail": "about cut off"},
        heads[1] | {"attempt": 0, "reason": "too short", "detail": "about too short"},
        heads[1] | {"attempt": 1, "reason": "duplicate", "detail": "of 0-conversation-0", "given_up": True},
        heads[2] | {"attempt": 0, "reason": "cut off", "detail": "about cut off"},
        heads[2] | {"attempt": 1, "reason": "no answer", "detail": "about no answer"},
        heads[2] | {"attempt": 2, "reason": "cut off", "detail": "about cut off", "given_up": True},
        heads[3] | {"attempt": 0, "reason": "failed", "detail": "HTTP 500"},
        heads[4] | {"attempt": 0, "reason": "not asked", "detail": ""},
    ]


def test_the_summary_counts_all(tmp_path: Path) -> None:
    ledger = {"answers": 8, "prompt_tokens": 0, "completion_tokens": 0, "usd": None, "failed_requests": 1}
    summary = write(tmp_path, ledger=ledger, prompts={"detail": "ab"}, recipe_hash="cd")
    assert summary == json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    versions = summary.pop("versions")
    assert set(versions) == {"python", "lora_llava", "openai"}
    nothing = {"rejected": 0, "failed": 0, "not_asked": 0}
    assert summary == {
        "complete": False, "tasks": 6, "rows": 2, "rejected": 2, "failed": 1, "not_asked": 1, "turns": 3, "images": 1,
        "flavours": {
            "conversation": {
                **nothing, "tasks": 3, "rows": 1, "rejected": 1, "not_asked": 1, "turns": 2, "words_per_answer": 2.5,
            },
            "detail": {**nothing, "tasks": 1, "rows": 1, "turns": 1, "words_per_answer": 3.0},
            "reasoning": {
                **nothing, "tasks": 2, "rows": 0, "rejected": 1, "failed": 1, "turns": 0, "words_per_answer": None,
            },
        },
        "reasons": {
            "cut off": {"attempts": 3, "tasks": 2, "given_up": 1},
            "no answer": {"attempts": 1, "tasks": 1, "given_up": 0},
            "too short": {"attempts": 1, "tasks": 1, "given_up": 0},
            "duplicate": {"attempts": 1, "tasks": 1, "given_up": 1},
        },
        "failures": {"HTTP 500": 1},
        "contexts": {
            **dict.fromkeys(vars(ContextReport()), 0), "images": 4, "captions": 4, "boxes": 4,
            "files": {"contexts": "c.jsonl"},
        },
        "teacher": {
            "backend": "server", "model": "owner/model", "answered_as": {"m": 4}, "temperature": 0.7, "top_p": 1.0,
            "max_tokens": 1024, "structured": True,
        },
        "flavour_weights": {"conversation": 58, "detail": 23, "reasoning": 77},
        "gates": {"max_attempts": 3, "min_turns": 2, "max_turns": 12, "min_words": None, "max_words": None}, "seed": 0,
        "image_folder": None, "ledger": ledger, "prompts": {"detail": "ab"}, "recipe_hash": "cd",
    }  # fmt: skip


STATUSES = st.sampled_from(["accepted", "rejected", "failed", "not asked"])


@given(drawn=st.lists(st.tuples(STATUSES, st.lists(st.sampled_from(sorted(REASONS)), max_size=3), st.integers(0, 3))))
def test_every_task_is_a_row_or_told_once_as_missing(
    drawn: list[tuple[str, list[str], int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("set")
    results = []
    for number, (status, reasons, text) in enumerate(drawn):
        reasons = reasons or (["empty"] if status == "rejected" else [])
        place = Task(f"t{number}", number % 4, FLAVOURS[number % 3], 0)
        turns = said("What is it?", f"Text {text}.") if status == "accepted" else ()
        results.append(Result(place, status, turns, told(*reasons), "why" if status == "failed" else ""))
    summary = write(folder, iter(results))
    rows = [row["id"] for row in iterate_rows(folder / "instruct.json")]
    lines = lines_of(folder)
    missing = [line["task_id"] for line in lines if line.get("given_up") or line["reason"] in ("failed", "not asked")]
    ids = [result.task.task_id for result in results]
    assert [name for name in ids if name in rows] == rows
    assert sorted(rows + missing) == sorted(ids)
    assert summary["tasks"] == len(ids) == sum(summary[name] for name in ("rows", "rejected", "failed", "not_asked"))
    assert sum(flavour["rows"] for flavour in summary["flavours"].values()) == summary["rows"] == len(rows)
    attempts = Counter(line["reason"] for line in lines)
    del attempts["failed"], attempts["not asked"]
    assert {reason: counts["attempts"] for reason, counts in summary["reasons"].items()} == attempts
    assert sum(counts["given_up"] for counts in summary["reasons"].values()) == summary["rejected"]
    assert summary["complete"] is not any(status in ("failed", "not asked") for status, _, _ in drawn)


def test_failures_of_many_kinds_do_not_fill_the_memory(tmp_path: Path) -> None:
    results = [Result(task(0), "failed", reason=f"HTTP 500 (request {number})") for number in range(200)]
    failures = write(tmp_path, results)["failures"]
    assert len(failures) == 51
    assert failures["other reasons"] == 150


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (Result(task(2), "accepted", said("What is <image>?", "It.")), "holds <image>"),
        (Result(task(2), "accepted"), "a sample is empty"),
        (Result(task(2), "rejected"), "rejected without a rejection"),
        (Result(task(2), "lost"), "'lost' is no status"),
    ],
)
def test_what_cannot_be_is_not_written_over_what_is(tmp_path: Path, result: Result, message: str) -> None:
    write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        write(tmp_path, [RESULTS[0], result])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_run_that_is_stopped_leaves_the_earlier_set(tmp_path: Path) -> None:
    def stopped() -> Iterator[Result]:
        yield RESULTS[1]
        raise KeyboardInterrupt

    write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, stopped())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file cannot be written \(File exists\); make room or mend it"):
        write(tmp_path / "file")


def test_a_set_without_rows_is_a_set(tmp_path: Path) -> None:
    summary = write(tmp_path, [Result(task(0), "rejected", rejections=told("empty"))])
    assert (tmp_path / "instruct.json").read_text() == "[]\n"
    assert summary["images"] == summary["turns"] == 0
    assert "0 conversations about 0 images" in (tmp_path / "README.md").read_text()


def test_nothing_of_this_machine_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")
    model = str(tmp_path / "models" / "teacher-7b")
    paths = {name: str(tmp_path / f"{name}.json") for name in ("captions", "instances", "contexts", "boxes", "images")}
    asked = recipe(TeacherSection(backend="transformers", model=model), **paths)
    results = [Result(task(0), "accepted", said("What?", "A dog."), told("cut off"), model=model)]
    summary = write_set(tmp_path, results=results, contexts=contexts(), recipe=asked, about={})
    assert summary["teacher"]["model"] == "teacher-7b"
    assert summary["teacher"]["answered_as"] == {"teacher-7b": 1}
    for name in FILES:
        content = (tmp_path / name).read_bytes()
        assert scan(name, content, written_by_us=True) == []
        assert str(tmp_path).encode() not in content


@pytest.mark.parametrize(
    ("rows", "category"),
    [
        (0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (158_000, "100K<n<1M"), (10**6, "1M<n<10M"),
        (10**7, "10M<n<100M"),
    ],
)  # fmt: skip
def test_size_categories(rows: int, category: str) -> None:
    assert size_category(rows) == category


def test_the_card_is_a_card(tmp_path: Path) -> None:
    write(tmp_path / "my set", prompts={"detail": "ab" * 32}, recipe_hash="cd" * 32)
    card = DatasetCard.load(tmp_path / "my set" / "README.md")
    assert card.data.to_dict() == {
        "language": ["en"], "license": "other", "pretty_name": "my set", "size_categories": ["n<1K"],
        "task_categories": ["visual-question-answering", "image-text-to-text"],
        "tags": ["llava", "synthetic", "lora_llava"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "instruct.json"}]}],
    }  # fmt: skip
    for part in (
        "# my set\n",
        "2 conversations about 1 image, made as LLaVA's own were (Visual Instruction Tuning, arXiv 2304.08485, "
        "section 3): `m`, which saw no image, was given",
        "> **Not complete:** of 6 samples that were to be made, 1 had no answer and 1 were not asked for.",
        "| conversation | 3 | 1 | 2 | 2.5 | 1 | 0 | 1 |",
        "| reasoning | 2 | 0 | 0 |  | 1 | 1 | 0 |",
        "| all | 6 | 2 | 3 |  | 2 | 1 | 1 |",
        f"| cut off | {REASONS['cut off']} | 3 | 1 |",
        f"| prompt, detail | SHA-256 `{'ab' * 32}` |",
        f"| recipe | SHA-256 `{'cd' * 32}` |",
        "- The text: by `m`. The terms of use of a model or its service may forbid",
        "COCO's are CC BY 4.0",
        "under Flickr's terms of use",
    ):
        assert part in card.text
    assert "by rules" not in card.text


def test_the_datasets_library_loads_a_set_by_its_card(tmp_path: Path) -> None:
    write(tmp_path / "set")
    loaded = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    assert loaded["train"].to_list() == json.loads((tmp_path / "set" / "instruct.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("teacher", [DEMO, SERVER])
def test_the_card_s_command_trains(tmp_path: Path, teacher: TeacherSection) -> None:
    write(tmp_path, teacher=teacher)
    command = re.search(r"^    (lora-llava finetune .*)$", (tmp_path / "README.md").read_text(), re.MULTILINE)
    assert command
    _, verb, name, *overrides = shlex.split(command[1])
    loaded = load_recipe(name, overrides)
    assert (verb, loaded.data.format, loaded.data.path, loaded.data.image_folder) == (
        "finetune", "conversations", "instruct.json", "IMAGES",
    )  # fmt: skip


def test_images_that_lie_beside_the_rows_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    asked = recipe(images=str(folder / "my images"))
    summary = write_set(folder, results=RESULTS, contexts=contexts(), recipe=asked, about={})
    assert summary["image_folder"] == "my images"
    card = (folder / "README.md").read_text()
    assert "The images, which `image` names, are in `my images`." in card
    assert " data.path=instruct.json data.image_folder='my images' output_dir=runs/mine\n\nin this folder.\n" in card


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(name=NAMES, model=NAMES)
@example(name="\x85", model="\\")
@example(name="`*_[a](b)|<b>&amp;\n# c", model="a`b|c\n\nd")
def test_no_name_breaks_the_card(name: str, model: str, card_summary: dict[str, Any]) -> None:
    summary = card_summary | {"teacher": card_summary["teacher"] | {"answered_as": {model: 1}}}
    card = DatasetCard(write_card(name, summary))
    plain = DatasetCard(write_card("set", card_summary))
    assert card.data.pretty_name == escape_hidden(" ".join(name.split()))
    lines, usual = card.text.splitlines(), plain.text.splitlines()
    heading = next(number for number, line in enumerate(usual) if line == "# set")
    assert re.sub(r"\\(.)", r"\1", lines.pop(heading)) == f"# {card.data.pretty_name}"
    del usual[heading]
    for mark in "|`":
        assert [line.count(mark) for line in lines] == [line.count(mark) for line in usual]


@pytest.fixture(scope="module")
def card_summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write(tmp_path_factory.mktemp("set"))


def test_the_demo_s_teacher_makes_a_set(tmp_path: Path) -> None:
    file = build_demo_contexts(tmp_path / "cache", 24)
    known = read_contexts(contexts=file)
    asked = recipe(DEMO, contexts=str(file), images=str(file.parent / "images"))
    prompts = load_prompts()
    with AnswerStore(tmp_path / "set" / LEDGER_FILE) as ledger:
        maker = Maker(known, plan_tasks(known, samples_per_image=2, seed=0), prompts, Settings(NAME), ledger)
        maker.run(answer_by_rules, Budget())
        about = {"ledger": ledger.totals(), "prompts": prompt_hashes(prompts)}
        summary = write_set(tmp_path / "set", results=maker.results(), contexts=known, recipe=asked, about=about)
    assert summary["complete"]
    assert summary["tasks"] == 48
    assert summary["rows"] + summary["rejected"] == 48
    assert summary["teacher"]["answered_as"] == {NAME: 48}
    source = open_source(tmp_path / "set" / "instruct.json", image_folder=file.parent / "images")
    rows = list(source.read())
    assert len(rows) == summary["rows"] > 40
    for row in rows:
        assert isinstance(row, Conversation)
        assert source.images.open(row.images[0]).size == (64, 64)
    card = (tmp_path / "set" / "README.md").read_text()
    assert "> **Written by rules, not by a language model.**" in card
    assert "| teacher | lora_llava's rules, no language model |" in card
    assert "sampling" not in card
    assert "SHA-256" not in card
    assert "The images, which `image` names, are not part of it." in card
    assert "from lora_llava's rules, Apache-2.0" in card
