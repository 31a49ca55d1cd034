"""Data generated despite failing teachers, bad answers and killed processes: nothing is lost or paid twice."""

from __future__ import annotations

import io
import json
import random
import sqlite3
import sys
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from inference.chat_server import Body, ChatLog
from rich.console import Console
from synthesis.made import files_of, number_of, recipe_of, seen, teach, write_recipe

from lora_llava.core.errors import UserError
from lora_llava.inference.client.answer_store import AnswerStore, request_key
from lora_llava.inference.client.chat_request import ChatAnswer, ChatRequest
from lora_llava.recipe import GenerateRecipe
from lora_llava.synthesis.generation import LEDGER_FILE, generate
from tests.forked import kill, wait_for
from tests.forked import start as start_verb


def make(recipe: GenerateRecipe, **caps: Any) -> dict[str, Any]:
    return generate(recipe, console=Console(file=io.StringIO()), **caps)


def rows_of(folder: Path) -> list[Any]:
    return list(json.loads((folder / "set" / "instruct.json").read_text()))


def lines_of(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "set" / "rejected.jsonl").read_text().splitlines()]


def kept(folder: Path) -> int:
    file = folder / "set" / LEDGER_FILE
    if not file.is_file():
        return 0
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as base:
        try:
            return int(base.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
        except sqlite3.OperationalError:
            return 0
        finally:
            base.rollback()


def test_rows_contain_the_teachers_answers(log: ChatLog, tmp_path: Path) -> None:
    summary = make(recipe_of(tmp_path, log.url, 30))
    assert summary["complete"]
    assert summary["tasks"] == summary["rows"] == len(rows_of(tmp_path)) == 30
    assert seen(log) == [1] * 30
    for row in rows_of(tmp_path):
        texts = " ".join(turn["value"] for turn in row["conversations"])
        assert f"all {int(row['image'][:3])}" in texts  # only the image 007.jpg has ball 7
        assert row["conversations"][0]["value"].startswith("<image>\n")
    assert log.requests[0]["response_format"]["type"] == "json_schema"
    assert {row["category"] for row in rows_of(tmp_path)} == {"conversation", "detail", "reasoning"}


def test_rejected_answers_are_requested_again_with_the_reason(log: ChatLog, tmp_path: Path) -> None:
    """Two of ten images get one bad answer, another one only bad answers."""

    def answer(body: Body) -> str:
        number, again = number_of(body), "was not taken" in body["messages"][-1]["content"]
        if number == 7 or (number in (3, 5) and not again):
            return teach(body).replace("near", "in the caption near")
        return teach(body)

    log.answer = answer
    summary = make(recipe_of(tmp_path, log.url, 10))
    assert summary["complete"]
    assert (summary["rows"], summary["rejected"]) == (9, 1)
    assert summary["reasons"] == {"source named": {"attempts": 5, "tasks": 3, "given_up": 1}}
    lines = lines_of(tmp_path)
    assert Counter(line["image"] for line in lines) == {"003.jpg": 1, "005.jpg": 1, "007.jpg": 3}
    assert [line["image"] for line in lines if line.get("given_up")] == ["007.jpg"]
    retries = [
        body["messages"][-1]["content"] for body in log.requests if "not taken" in body["messages"][-1]["content"]
    ]
    assert len(retries) == 4
    assert all("speaks of captions, boxes or a description" in text for text in retries)
    before = len(log.requests)
    assert make(recipe_of(tmp_path, log.url, 10)) == summary
    assert len(log.requests) == before


FAULTS = ("429", "500", "stall", "cut", "html", "no choices")


def test_every_sample_is_generated_or_reported_when_the_teacher_fails(log: ChatLog, tmp_path: Path) -> None:
    """One request in ten fails, each in a different way; two images never get an answer."""
    drawn = random.Random(3)

    def behave(body: Body, count: int) -> str:
        if number_of(body) in (11, 12):
            return "500"
        return drawn.choice(FAULTS) if drawn.random() < 0.1 else "ok"

    log.behave = behave
    teacher = {"timeout": 0.5, "retries": 4, "concurrency": 16}
    summary = make(recipe_of(tmp_path, log.url, 60, teacher=teacher))
    made = [row["image"] for row in rows_of(tmp_path)]
    reported = [line["image"] for line in lines_of(tmp_path)]
    assert sorted(made + reported) == [f"{number:03}.jpg" for number in range(60)]
    assert {"011.jpg", "012.jpg"} <= set(reported)
    assert summary["failed"] == len(reported)
    assert not summary["complete"]
    assert len(set(made)) == len(made) == summary["rows"]
    log.behave = lambda body, count: "ok"
    answered = len(log.answered)
    again = make(recipe_of(tmp_path, log.url, 60, teacher=teacher))
    assert again["complete"]
    assert again["rows"] == 60
    assert len(log.answered) == 60 > answered
    assert set(log.charged.values()) == {1}


def start(recipe: str) -> BaseProcess:
    return start_verb(["generate-data", recipe])


def wrong_at_times(body: Body) -> str:
    again = "was not taken" in body["messages"][-1]["content"]
    return "I cannot tell." if number_of(body) % 5 == 2 and not again else teach(body)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no forkserver")
def test_a_run_killed_at_twenty_points_pays_nothing_twice_and_ends_with_the_same_set(
    log: ChatLog, tmp_path: Path
) -> None:
    log.answer = wrong_at_times
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    make(recipe_of(unbroken, log.url, 60))
    total = kept(unbroken)
    assert total == 72  # 60, and 12 second tries
    log.answered.clear()
    log.charged.clear()
    log.known.clear()
    log.given, before = 0, 0
    recipe = recipe_of(killed, log.url, 60)
    file = write_recipe(recipe, tmp_path)
    for point in sorted(random.Random(9).sample(range(1, total), 20)):
        log.gate = point  # later requests are in flight when the process is killed
        process = start(file)
        wait_for(lambda point=point: kept(killed) == point)  # type: ignore[misc]
        kill(process)
        assert sum(log.answered.values()) == point > before
        before = point
    log.gate = None
    summary = make(recipe)
    assert set(log.charged.values()) == {1}
    assert set(log.answered.values()) == {1}
    assert len(log.answered) == kept(killed) == total
    assert summary["complete"]
    assert files_of(killed) == files_of(unbroken)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no forkserver")
def test_a_run_killed_at_any_moment_pays_nothing_twice_on_a_server_with_idempotency_keys(
    log: ChatLog, tmp_path: Path
) -> None:
    """Requests that were in flight are sent again with the same Idempotency-Key."""
    log.latency = 0.01
    recipe = recipe_of(tmp_path, log.url, 40)
    file = write_recipe(recipe, tmp_path)
    drawn = random.Random(4)
    for _ in range(5):
        before = kept(tmp_path)
        process = start(file)
        wait_for(lambda before=before: kept(tmp_path) > before)  # type: ignore[misc]
        time.sleep(drawn.uniform(0, 0.02))
        kill(process)
    make(recipe)
    assert set(log.charged.values()) == {1}
    assert max(log.answered.values()) <= 1 + 5
    assert kept(tmp_path) == 40


def test_a_run_stopped_by_caps_resumes(log: ChatLog, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, log.url, 12, teacher={"price_in": 10.0, "price_out": 1000.0})
    first = make(recipe, max_requests=5)
    assert (first["rows"], first["not_asked"], first["complete"]) == (5, 7, False)
    assert len(log.requests) == 5
    assert [line["reason"] for line in lines_of(tmp_path)] == ["not asked"] * 7
    second = make(recipe, max_cost=1.1)  # up to 1,024 tokens each: no two requests at a time fit
    assert 5 < second["rows"] < 12
    assert second["ledger"]["usd"] < 1.1 + first["ledger"]["usd"]
    assert make(recipe)["rows"] == 12
    assert set(log.answered.values()) == {1}


def test_a_teacher_without_any_answer_stops_the_run(log: ChatLog, tmp_path: Path) -> None:
    log.behave = lambda body, count: "400"
    with pytest.raises(UserError, match="the teacher answered none of 8 requests: HTTP 400"):
        make(recipe_of(tmp_path, log.url, 30))
    assert len(log.requests) < 30


def test_the_answer_store_is_append_only_and_locked(tmp_path: Path) -> None:
    request = ChatRequest([{"role": "user", "content": "a"}], 5)
    key = request_key("m", request, "t", 0)
    assert (
        len(
            {
                key,
                request_key("n", request, "t", 0),
                request_key("m", request, "u", 0),
                request_key("m", request, "t", 1),
            }
        )
        == 4
    )
    with AnswerStore(tmp_path / LEDGER_FILE) as ledger:
        ledger.add(key, "t", 0, "hash", ChatAnswer("text", 3, 4, "m"), 0.5, "accepted", "")
        with pytest.raises(UserError, match="another run is using it"):
            AnswerStore(tmp_path / LEDGER_FILE)
        with pytest.raises(UserError, match="cannot be used"):
            ledger.add(key, "t", 0, "hash", ChatAnswer("other", 3, 4, "m"), 0.5, "accepted", "")
    with sqlite3.connect(tmp_path / LEDGER_FILE) as base:
        for change in ("UPDATE answers SET text = 'x'", "DELETE FROM answers"):
            with pytest.raises(sqlite3.IntegrityError, match="append only"):
                base.execute(change)
    base.close()
    with AnswerStore(tmp_path / LEDGER_FILE) as ledger:
        entry = ledger.get(key)
        assert entry is not None
        assert (entry.text, entry.model) == ("text", "m")
        assert ledger.totals() == {
            "answers": 1,
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "usd": 0.5,
            "failed_requests": 0,
        }
    (tmp_path / "other.sqlite").write_bytes(b"not an answer store, but long enough to have a header" * 4)
    with pytest.raises(UserError, match="is damaged or not an answer store"):
        AnswerStore(tmp_path / "other.sqlite")


def test_a_full_disk_is_a_one_line_error_and_loses_nothing(log: ChatLog, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, log.url, 40)
    make(recipe, max_requests=3)
    real = sqlite3.connect

    def small(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        base = real(*args, **kwargs)
        (pages,) = base.execute("PRAGMA page_count").fetchone()
        base.execute(f"PRAGMA max_page_count={pages + 1}")
        return base

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", small)
        with pytest.raises(
            UserError, match=r"cannot be written \(.*full.*\); free some space and run the same command again"
        ):
            make(recipe)
    answered = kept(tmp_path)
    assert 3 < answered < 40
    assert make(recipe)["rows"] == 40
