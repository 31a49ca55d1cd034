"""Output files: every task appears exactly once, missing ones have a reason, and files are replaced together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthesis.sample_sets import DEMO, RESULTS, contexts, recipe, rejections, task, turns, write

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import Conversation
from lora_llava.data.files.row_files import iterate_rows
from lora_llava.data.sources import open_source
from lora_llava.demo.dataset import build_demo_contexts
from lora_llava.inference.client.answer_store import AnswerStore
from lora_llava.inference.client.budget import Budget
from lora_llava.publishing.private_content import scan
from lora_llava.recipe.generate_schema import TeacherSection
from lora_llava.synthesis.contexts.context_builder import ContextReport
from lora_llava.synthesis.contexts.reading_contexts import read_contexts
from lora_llava.synthesis.gates.gates import REASONS
from lora_llava.synthesis.generation import LEDGER_FILE
from lora_llava.synthesis.output import write_set
from lora_llava.synthesis.pipeline import PipelineSettings, Result, SampleGenerator
from lora_llava.synthesis.prompts import load_prompts, prompt_hashes
from lora_llava.synthesis.sample import FLAVOURS, Task
from lora_llava.synthesis.tasks import plan_tasks
from lora_llava.synthesis.teachers.demo_teacher import NAME, answer_by_rules

FILES = ["README.md", "gallery.html", "instruct.json", "rejected.jsonl", "summary.json"]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text(encoding="utf-8").split("\n") if line]


def test_rows_have_the_form_of_llava(tmp_path: Path) -> None:
    write(tmp_path)
    assert json.loads((tmp_path / "instruct.json").read_text(encoding="utf-8")) == [
        {
            "id": "0-conversation-0",
            "image": "0.jpg",
            "category": "conversation",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "A dog."},
                {"from": "human", "value": "Where, then?"},
                {"from": "gpt", "value": "On the left"},
            ],
        },
        {
            "id": "0-detail-0",
            "image": "0.jpg",
            "category": "detail",
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe it."},
                {"from": "gpt", "value": "Ein Hündchen \u2028 «links»."},
            ],
        },
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES


def test_our_own_reader_accepts_the_rows(tmp_path: Path) -> None:
    write(tmp_path)
    rows = list(open_source(tmp_path / "instruct.json").read())
    assert rows == [
        Conversation(
            "0-conversation-0",
            turns("<image>\nWhat?", "A dog.", "Where, then?", "On the left"),
            ("0.jpg",),
            {"type": "conversation"},
        ),
        Conversation(
            "0-detail-0", turns("<image>\nDescribe it.", "Ein Hündchen \u2028 «links»."), ("0.jpg",), {"type": "detail"}
        ),
    ]


def test_rejected_and_missing_samples_are_listed(tmp_path: Path) -> None:
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


def test_the_summary_counts_everything(tmp_path: Path) -> None:
    ledger = {"answers": 8, "prompt_tokens": 0, "completion_tokens": 0, "usd": None, "failed_requests": 1}
    summary = write(tmp_path, ledger=ledger, prompts={"detail": "ab"}, recipe_hash="cd")
    assert summary == json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    versions = summary.pop("versions")
    assert set(versions) == {"python", "lora_llava", "openai"}
    nothing = {"rejected": 0, "failed": 0, "not_asked": 0}
    assert summary == {
        "complete": False,
        "tasks": 6,
        "rows": 2,
        "rejected": 2,
        "failed": 1,
        "not_asked": 1,
        "turns": 3,
        "images": 1,
        "flavours": {
            "conversation": {
                **nothing,
                "tasks": 3,
                "rows": 1,
                "rejected": 1,
                "not_asked": 1,
                "turns": 2,
                "words_per_answer": 2.5,
            },
            "detail": {**nothing, "tasks": 1, "rows": 1, "turns": 1, "words_per_answer": 3.0},
            "reasoning": {
                **nothing,
                "tasks": 2,
                "rows": 0,
                "rejected": 1,
                "failed": 1,
                "turns": 0,
                "words_per_answer": None,
            },
        },
        "reasons": {
            "cut off": {"attempts": 3, "tasks": 2, "given_up": 1},
            "no answer": {"attempts": 1, "tasks": 1, "given_up": 0},
            "too short": {"attempts": 1, "tasks": 1, "given_up": 0},
            "duplicate": {"attempts": 1, "tasks": 1, "given_up": 1},
        },
        "cut_off_kept": 0,
        "ungrounded": {"things": 1, "missing": 0, "share": 0.0, "most_common": {}},
        "failures": {"HTTP 500": 1},
        "contexts": {
            **dict.fromkeys(vars(ContextReport()), 0),
            "images": 4,
            "captions": 4,
            "boxes": 4,
            "files": {"contexts": "c.jsonl"},
        },
        "teacher": {
            "backend": "server",
            "model": "owner/model",
            "answered_as": {"m": 4},
            "temperature": 0.7,
            "top_p": 1.0,
            "max_tokens": 1024,
            "structured": True,
        },
        "flavour_weights": {"conversation": 58, "detail": 23, "reasoning": 77},
        "gates": {
            "max_attempts": 3,
            "min_turns": 2,
            "max_turns": 12,
            "min_words": None,
            "max_words": None,
            "max_ungrounded": 0.7,
        },
        "seed": 0,
        "image_folder": None,
        "ledger": ledger,
        "prompts": {"detail": "ab"},
        "recipe_hash": "cd",
    }


STATUSES = st.sampled_from(["accepted", "rejected", "failed", "not asked"])


@given(drawn=st.lists(st.tuples(STATUSES, st.lists(st.sampled_from(sorted(REASONS)), max_size=3), st.integers(0, 3))))
def test_every_task_is_a_row_or_listed_once_as_missing(
    drawn: list[tuple[str, list[str], int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("set")
    results = []
    for number, (status, reasons, text) in enumerate(drawn):
        reasons = reasons or (["empty"] if status == "rejected" else [])
        place = Task(f"t{number}", number % 4, FLAVOURS[number % 3], 0)
        sample = turns("What is it?", f"Text {text}.") if status == "accepted" else ()
        results.append(Result(place, status, sample, rejections(*reasons), "why" if status == "failed" else ""))
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


def test_distinct_failure_reasons_are_limited(tmp_path: Path) -> None:
    results = [Result(task(0), "failed", reason=f"HTTP 500 (request {number})") for number in range(200)]
    failures = write(tmp_path, results)["failures"]
    assert len(failures) == 51
    assert failures["other reasons"] == 150


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (Result(task(2), "accepted", turns("What is <image>?", "It.")), "contains <image>"),
        (Result(task(2), "accepted"), "the sample is empty"),
        (Result(task(2), "rejected"), "there is no rejection"),
        (Result(task(2), "lost"), "unknown status 'lost'"),
    ],
)
def test_invalid_results_leave_the_earlier_files(tmp_path: Path, result: Result, message: str) -> None:
    write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        write(tmp_path, [RESULTS[0], result])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_interrupted_run_leaves_the_earlier_files(tmp_path: Path) -> None:
    def stopped() -> Iterator[Result]:
        yield RESULTS[1]
        raise KeyboardInterrupt

    write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, stopped())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"file cannot be written \(File exists\); free disk space or fix its permissions"
    ):
        write(tmp_path / "file")


def test_a_set_may_have_no_rows(tmp_path: Path) -> None:
    summary = write(tmp_path, [Result(task(0), "rejected", rejections=rejections("empty"))])
    assert (tmp_path / "instruct.json").read_text() == "[]\n"
    assert summary["images"] == summary["turns"] == 0
    assert "0 conversations about 0 images" in (tmp_path / "README.md").read_text()


def test_no_path_or_key_of_this_machine_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")
    model = str(tmp_path / "models" / "teacher-7b")
    paths = {name: str(tmp_path / f"{name}.json") for name in ("captions", "instances", "contexts", "boxes", "images")}
    settings = recipe(TeacherSection(backend="transformers", model=model), **paths)
    results = [Result(task(0), "accepted", turns("What?", "A dog."), rejections("cut off"), model=model)]
    summary = write_set(tmp_path, results=results, contexts=contexts(), recipe=settings, about={})
    assert summary["teacher"]["model"] == "teacher-7b"
    assert summary["teacher"]["answered_as"] == {"teacher-7b": 1}
    for name in FILES:
        content = (tmp_path / name).read_bytes()
        assert scan(name, content, written_by_us=True) == []
        assert str(tmp_path).encode() not in content


def test_the_demo_teacher_generates_a_set(tmp_path: Path) -> None:
    file = build_demo_contexts(tmp_path / "cache", 24)
    known = read_contexts(contexts=file)
    settings = recipe(DEMO, contexts=str(file), images=str(file.parent / "images"))
    prompts = load_prompts()
    with AnswerStore(tmp_path / "set" / LEDGER_FILE) as ledger:
        generator = SampleGenerator(
            known, plan_tasks(known, samples_per_image=2, seed=0), prompts, PipelineSettings(NAME), ledger
        )
        generator.run(answer_by_rules, Budget())
        about = {"ledger": ledger.totals(), "prompts": prompt_hashes(prompts)}
        summary = write_set(tmp_path / "set", results=generator.results(), contexts=known, recipe=settings, about=about)
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
    assert "The images, which `image` names, are not included." in card
    assert "written by lora_llava's rules, Apache-2.0" in card
