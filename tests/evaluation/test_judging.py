"""Judgements from a real server that answers well, badly or not at all."""

from __future__ import annotations

import hashlib
import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from inference.chat_server import Body, ChatLog, question_of
from llava_bench_files import bench, options

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.evaluation.judge.judge_ledger import LEDGER, OLD_LEDGER, open_judge_ledger
from lora_llava.inference.client.answer_store import request_key
from lora_llava.inference.client.budget import Budget, estimate_tokens
from lora_llava.inference.client.client import ChatAnswer, ChatRequest
from tests.forked import kill, wait_for
from tests.forked import start as start_verb


def parts_of(body: Body) -> tuple[int, str, bool]:
    """Return the question's number, whose answer comes first, and whether the reminder is included."""
    text = question_of(body)
    number = int(re.search(r"What is in (\d+)\?", text)[1])  # type: ignore[index]
    return number, "gpt" if f"<answer_1>\ngpt {number}" in text else "ours", "Your reply has to begin" in text


def judge_by_number(body: Body) -> str:
    """Score the first answer one point higher: the reference gets 8, ours 6 to 8."""
    number, first, _ = parts_of(body)
    gpt, ours = 8 + (first == "gpt"), 6 + number % 3 + (first == "ours")
    return f"{gpt} {ours}\nFine [/INST]." if first == "gpt" else f"{ours} {gpt}\nFine."


def run(log: ChatLog, folder: Path, *more: str, count: int = 6) -> int:
    files = (
        bench(folder, count)
        if not (folder / "questions.jsonl").is_file()
        else {name: folder / f"{name}.jsonl" for name in ("questions", "context", "reference", "answers")}
    )
    return main(None, ["score", "llava-bench", *options(files), "--judge-url", log.url, *more])


def report_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "llava_bench.json").read_text())
    return content


def ledger_of(folder: Path) -> list[dict[str, Any]]:
    file = folder / LEDGER
    if not file.is_file():
        return []
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as base:
        base.row_factory = sqlite3.Row
        try:
            return [dict(row) for row in base.execute("SELECT key, text FROM answers")]
        except sqlite3.OperationalError:  # the tables are not there yet
            return []


def test_both_orders_are_judged_and_averaged(log: ChatLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.answer = judge_by_number
    assert run(log, tmp_path) == 0
    assert Counter(parts_of(body)[:2] for body in log.requests) == Counter(
        (number, first) for number in range(6) for first in ("gpt", "ours")
    )
    report = report_of(tmp_path)
    assert report["questions"][1] == {
        "question_id": "1",
        "category": "detail",
        "status": "scored",
        "answer": 7.5,
        "reference": 8.5,
        "orders": {"reference_first": [9.0, 7.0], "answer_first": [8.0, 8.0]},
    }
    assert {name: (row["answer"], row["reference"], row["relative"]) for name, row in report["table"].items()} == {
        "conv": (6.5, 8.5, 76.47),
        "detail": (7.5, 8.5, 88.24),
        "complex": (8.5, 8.5, 100.0),
        "all": (7.5, 8.5, 88.24),
    }
    assert report["complete"] is True
    assert report["judge"] == {"url": log.url, "model": "judge", "model_told": ["judge-0613"]}
    answers = (tmp_path / "answers.jsonl").read_bytes()
    assert report["files"]["answers"] == hashlib.sha256(answers).hexdigest()
    assert list(report["prompts"]) == ["system", "conv", "detail", "complex", "reminder"]
    output = capsys.readouterr().out
    assert "12 of 12 judgements to request" in output
    assert re.search(r"│ all +│ +6 │ 7.50 │ +8.50 │ +88.2 │ .*│ +0 │", output)


def test_without_swap_only_llavas_order_is_judged(log: ChatLog, tmp_path: Path) -> None:
    log.answer = judge_by_number
    assert run(log, tmp_path, "--no-swap") == 0
    assert [parts_of(body)[1] for body in log.requests] == ["gpt"] * 6
    assert report_of(tmp_path)["table"]["all"]["relative"] == round(100 * (6 + 7 + 8) * 2 / (9 * 6), 2)


def test_unreadable_scores_are_requested_twice_more_and_then_reported(
    log: ChatLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: Body) -> str:
        number, first, reminded = parts_of(body)
        if number == 2 and first == "ours":
            return "I cannot say."
        return "Both are good." if number == 3 and not reminded else judge_by_number(body)

    log.answer = answer
    assert run(log, tmp_path) == 0
    tries = Counter(parts_of(body)[:2] for body in log.requests)
    assert tries == Counter({(n, f): 1 for n in range(6) for f in ("gpt", "ours")}) + Counter(
        {(2, "ours"): 2, (3, "gpt"): 1, (3, "ours"): 1}
    )
    assert sorted(body["temperature"] for body in log.requests if parts_of(body)[:2] == (2, "ours")) == [0.0, 0.0, 0.3]
    report = report_of(tmp_path)
    row = report["questions"][2]
    assert (row["status"], row["answer"], row["orders"]) == ("unparsed", None, {"reference_first": [9.0, 8.0]})
    table = report["table"]
    assert (table["all"]["unparsed"], table["all"]["scored"]) == (1, 5)
    assert table["complex"]["answer"] == 8.5  # of question 5 alone
    assert (
        "1 unparsed: no readable scores in 3 replies of the judge; left out of the average: 2\n"
        in capsys.readouterr().out
    )
    log.requests.clear()
    assert run(log, tmp_path) == 0
    assert log.requests == []


def test_a_failed_question_is_reported_and_retried_by_the_next_run(
    log: ChatLog, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-to-be-seen")
    log.answer, log.behave = judge_by_number, lambda body, count: "400" if parts_of(body)[0] == 4 else "ok"
    assert run(log, tmp_path, "--concurrency", "1") == 1
    report = report_of(tmp_path)
    assert [row["status"] for row in report["questions"]] == ["scored"] * 4 + ["failed", "scored"]
    assert report["questions"][4]["reason"] == "HTTP 400: refused with 400 for Bearer ***"
    assert log.keys == {"Bearer sk-not-to-be-seen"}
    assert [file.name for file in tmp_path.iterdir() if b"sk-not-to-be-seen" in file.read_bytes()] == []
    assert report["complete"] is False
    output = capsys.readouterr().out
    assert "1 failed: the judge did not reply; run the same command to try again (HTTP 400: refused with 400" in output
    log.behave = lambda body, count: "ok"
    log.requests.clear()
    assert run(log, tmp_path) == 0
    assert {parts_of(body)[0] for body in log.requests} == {4}


def test_a_judge_without_any_answer_stops_the_run(
    log: ChatLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.behave = lambda body, count: "400"
    assert run(log, tmp_path, count=60) == 2
    assert "answered none of 8 requests: HTTP 400: refused with 400" in capsys.readouterr().err
    assert len(log.requests) <= 16


def test_a_run_stopped_by_a_request_cap_resumes(
    log: ChatLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.answer = judge_by_number
    whole = tmp_path / "whole"
    assert run(log, whole) == 0
    log.requests.clear()
    assert run(log, tmp_path / "capped", "--max-requests", "5") == 1
    assert len(log.requests) == 5
    assert "not asked: the cap was reached; the same command resumes" in capsys.readouterr().out
    assert run(log, tmp_path / "capped", "--max-requests", "6") == 1
    assert run(log, tmp_path / "capped", "--max-requests", "6") == 0
    assert len(log.requests) == 12
    assert report_of(tmp_path / "capped")["table"] == report_of(whole)["table"]


def test_a_cap_on_cost_is_not_exceeded(log: ChatLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.answer = judge_by_number
    prices = ["--price-in", "100", "--price-out", "1000"]
    most = 1024 * 1000 / 1e6  # of the judge's text alone
    assert run(log, tmp_path, *prices, "--max-cost", str(most)) == 1
    assert log.requests == []  # the prompt costs more
    assert run(log, tmp_path, *prices, "--max-cost", "1.1", "--concurrency", "4") == 1
    sent = len(log.requests)
    assert 0 < sent < 12  # one at a time: the reservation for one leaves no room for another
    assert log.at_once == 1
    spent = report_of(tmp_path)["this_run"]["usd"]
    assert spent == pytest.approx(sum(100 * 100 + 1000 * len(row["text"].split()) for row in ledger_of(tmp_path)) / 1e6)
    assert spent <= 1.1
    assert f"{sent} requests in this run, {spent:.4f} USD" in capsys.readouterr().out


def test_a_cap_below_the_cost_of_one_request_is_reported_with_both_numbers(
    log: ChatLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.answer = judge_by_number
    prices = ["--price-in", "100", "--price-out", "1000"]
    assert run(log, tmp_path, *prices, "--max-cost", "0.5") == 1
    assert log.requests == []
    output = capsys.readouterr().out
    found = re.search(
        r"6 not asked: --max-cost 0.5 is below the (1\.\d{4}) USD that one request may cost; raise it", output
    )
    assert found
    assert "the same command" not in output
    assert "no question was scored" in output
    assert report_of(tmp_path)["table"]["all"]["not asked"] == 6
    assert run(log, tmp_path, *prices, "--max-cost", found[1]) == 1  # enough for the first request
    assert log.requests
    assert "the cap was reached; the same command resumes" in capsys.readouterr().out


def test_a_judge_without_readable_scores_yields_no_score(
    log: ChatLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.answer = lambda body: "I cannot say."
    assert run(log, tmp_path) == 1
    report = report_of(tmp_path)
    assert report["complete"] is False
    assert (report["table"]["all"]["unparsed"], report["table"]["all"]["relative"]) == (6, None)
    output = capsys.readouterr().out
    assert "\nno question was scored, so there is no score\n" in output
    assert "incomplete" in output


def test_json_is_the_only_output_on_stdout(log: ChatLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.answer = judge_by_number
    assert run(log, tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == report_of(tmp_path)


def test_a_report_of_other_answers_is_not_overwritten(
    log: ChatLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.answer = judge_by_number
    assert run(log, tmp_path) == 0
    answers = tmp_path / "answers.jsonl"
    answers.write_text(answers.read_text().replace("ours", "ours too"))
    log.requests.clear()
    assert run(log, tmp_path) == 2
    assert "is the report of other answers; choose another --output" in capsys.readouterr().err
    assert log.requests == []
    assert run(log, tmp_path, "--output", str(tmp_path / "other")) == 0


def test_equal_answers_are_judged_once_and_score_equally(log: ChatLog, tmp_path: Path) -> None:
    log.answer = lambda body: "9 8\nThe first is better."
    files = bench(tmp_path, 1)
    files["answers"].write_text(files["reference"].read_text())
    assert run(log, tmp_path) == 0
    assert len(log.requests) == 1
    assert report_of(tmp_path)["table"]["all"]["relative"] == 100.0


MESSAGES = [{"role": "user", "content": "abcdefghi"}]


def test_answers_of_an_earlier_version_are_copied_once(tmp_path: Path) -> None:
    counts = {"prompt_tokens": 3, "completion_tokens": 4}
    about = {"question_id": "0", "order": "reference_first", "attempt": 1}
    rows: list[dict[str, Any]] = [
        {"key": "a", **about, "model": "judge", **counts, "text": "8 9\n\u2028\ud83d", "usd": 0.5, "capped": True},
        {"key": "b", "failed": "HTTP 500", **counts, "usd": 0.25, "capped": True},
        {"key": "c", "model": "judge", **counts, "text": "7 7"},
    ]
    old = tmp_path / OLD_LEDGER
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    old.write_bytes(lines + lines[:30])  # the last line was cut off
    for _ in range(2):
        with open_judge_ledger(tmp_path) as ledger:
            assert ledger.get("a") == ChatAnswer("8 9\n\u2028?", 3, 4, "judge")
            assert (ledger.get("b"), ledger.get("c")) == (None, ChatAnswer("7 7", 3, 4, "judge"))
            assert (ledger.count(), ledger.spent_under_caps()) == (2, 0.75)
    assert old.read_bytes() == lines + lines[:30]
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / OLD_LEDGER).write_bytes(lines + b'{"key": 1}\n')
    for _ in range(2):
        with pytest.raises(UserError, match=r"llava_bench_judge.jsonl, line 4: not an answer of a judge; remove"):
            open_judge_ledger(damaged)


def test_keys_depend_on_everything_that_an_answer_depends_on() -> None:
    request = ChatRequest(MESSAGES, 10)
    keys = [
        request_key("judge", request, 0),
        request_key("judge", request, 1),
        request_key("other", request, 0),
        request_key("judge", ChatRequest(MESSAGES, 11), 0),
        request_key("judge", ChatRequest(MESSAGES, 10, 0.1), 0),
        request_key("judge", ChatRequest([{"role": "user", "content": "b"}], 10), 0),
    ]
    assert len(set(keys)) == 6
    assert request_key("judge", ChatRequest([dict(reversed(MESSAGES[0].items()))], 10), 0) == keys[0]


def test_a_budget_counts_actual_costs_and_reserves_the_maximum() -> None:
    request = ChatRequest(MESSAGES, 1000)
    assert estimate_tokens(request) == 3
    budget = Budget(price_in=1e6, price_out=1e3, max_cost=9.0)
    assert budget.take("a", request)  # 3 + 1 USD at most
    assert budget.take("b", request)
    assert not budget.take("c", request)
    assert not budget.exhausted
    budget.settle("a", request, ChatAnswer("8 9", 2, 500, "judge"))
    budget.settle("b", request, ChatAnswer("8 9 1234", 0, 0, "judge"))  # no counts: estimated
    assert budget.spent == pytest.approx(2 + 0.5 + 3 + 0.008)
    assert not budget.take("c", request)
    assert budget.exhausted
    assert budget.requests == 2


def start(log: ChatLog, folder: Path) -> BaseProcess:
    names = ("questions", "context", "reference", "answers")
    files = {name: folder / f"{name}.jsonl" for name in names}
    argv = ["score", "llava-bench", *options(files), "--judge-url", log.url, "--judge-model", "judge"]
    return start_verb(argv)


def unreadable_at_times(body: Body) -> str:
    number, first, reminded = parts_of(body)
    return "Hm." if number % 4 == 1 and first == "gpt" and not reminded else judge_by_number(body)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no forkserver")
def test_a_run_killed_at_ten_points_repeats_no_request_and_ends_equal(log: ChatLog, tmp_path: Path) -> None:
    log.answer = unreadable_at_times
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert run(log, unbroken, "--judge-model", "judge", count=20) == 0
    total = len(ledger_of(unbroken))
    assert total == 45  # both orders of 20, and 5 texts without scores
    log.answered.clear()
    bench(killed, 20)
    log.given, before = 0, 0
    for point in sorted(random.Random(5).sample(range(1, total), 10)):
        log.gate = point  # later requests are in flight when the process is killed
        process = start(log, killed)
        wait_for(lambda point=point: len(ledger_of(killed)) == point)  # type: ignore[misc]
        kill(process)
        assert sum(log.answered.values()) == point > before
        before = point
    log.gate = None
    assert run(log, killed, "--judge-model", "judge", count=20) == 0
    assert set(log.answered.values()) == {1}
    assert len(log.answered) == total
    assert {row["key"] for row in ledger_of(killed)} == {row["key"] for row in ledger_of(unbroken)}
    assert len(ledger_of(killed)) == total
    assert {**report_of(killed), "this_run": None} == {**report_of(unbroken), "this_run": None}


def test_ctrl_c_keeps_the_answers(log: ChatLog, tmp_path: Path) -> None:
    log.answer, log.gate = judge_by_number, 3
    call = ["score", "llava-bench", *options(bench(tmp_path, 6)), "--judge-url", log.url]
    command = [sys.executable, "-m", "lora_llava.commands.main", *call]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: len(ledger_of(tmp_path)) == 3)
        process.send_signal(signal.SIGINT)
        _, output = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"stopped; 3 answers are in {tmp_path / LEDGER}" in output
    assert "Traceback" not in output
    log.gate = None
    assert run(log, tmp_path) == 0
    assert len(ledger_of(tmp_path)) == 12


def key_of(body: Body) -> str:
    attempt = 0 if not parts_of(body)[2] else 1 if body["temperature"] == 0 else 2
    return request_key("judge", ChatRequest(body["messages"], body["max_tokens"], body["temperature"]), attempt)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no forkserver")
def test_a_run_killed_at_any_moment_requests_no_stored_answer_again(log: ChatLog, tmp_path: Path) -> None:
    log.answer, log.latency = unreadable_at_times, 0.03
    bench(tmp_path, 20)
    rng = random.Random(11)
    for _ in range(4):
        begun, had = len(log.requests), {row["key"] for row in ledger_of(tmp_path)}
        process = start(log, tmp_path)
        wait_for(lambda had=had: len(ledger_of(tmp_path)) > len(had))  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.03))
        kill(process)
        assert had.isdisjoint(map(key_of, log.requests[begun:]))
    begun, had = len(log.requests), {row["key"] for row in ledger_of(tmp_path)}
    assert 0 < len(had) < 45
    assert run(log, tmp_path, "--judge-model", "judge") == 0
    assert {row["key"] for row in ledger_of(tmp_path)} - had == set(map(key_of, log.requests[begun:]))
    assert len(ledger_of(tmp_path)) == 45
