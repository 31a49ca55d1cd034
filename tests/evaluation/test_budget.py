"""Caps on cost count every try, answered or not, on servers that fail seven times out of eight."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from inference.chat_server import Body, ChatLog
from llava_bench_files import bench, options
from synthesis.made import recipe_of, teach, write_recipe

from lora_llava.commands.main import main
from lora_llava.inference.client.budget import Budget, estimate_text_tokens, estimate_tokens
from lora_llava.inference.client.chat_request import ChatAnswer, ChatFailure, ChatRequest
from lora_llava.inference.client.client import ChatServer, ask

REQUEST = ChatRequest([{"role": "user", "content": "abcdefghi"}], 1000)
MOST_OUT = 1024
FAULTS = ("no choices, used", "stall", "500", "html")


def failing(body: Body, count: int, made: list[int]) -> str:
    """Fail seven of eight requests, each in a different way."""
    made.append(count)
    return "ok" if len(made) % 8 == 0 else FAULTS[len(made) % len(FAULTS)]


def work_of(made: list[int], prompt: int, answered: int) -> float:
    """Return the USD of the server's work, at 10 and 1,000 USD for a million tokens."""
    usd = {"no choices, used": 500 * 10 + 700 * 1000, "ok": 100 * 10 + answered * 1000}
    most = prompt * 10 + MOST_OUT * 1000
    kinds = ["ok" if n % 8 == 0 else FAULTS[n % len(FAULTS)] for n in range(1, len(made) + 1)]
    return sum(usd.get(kind, most) for kind in kinds) / 1e6


@pytest.mark.parametrize("concurrency", [1, 3])
def test_generated_data_stays_under_the_cap_with_a_failing_server(
    log: ChatLog, tmp_path: Path, concurrency: int, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[int] = []
    log.answer, log.behave = teach, lambda body, count: failing(body, count, made)
    teacher = {"timeout": 0.3, "retries": 1, "concurrency": concurrency, "price_in": 10.0, "price_out": 1000.0}
    recipe = write_recipe(recipe_of(tmp_path, log.url, 40, teacher=teacher), tmp_path)
    argv = ["generate-data", recipe, "--max-cost", "8", "--json"]
    assert main(None, argv) == 1
    prompt = max(map(prompt_tokens, log.requests))
    assert 5 < work_of(made, prompt, 60) <= 8
    assert "the same command resumes with a higher --max-cost" in capsys.readouterr().err
    tries = len(made)
    assert main(None, argv) == 1  # the same cap: earlier spending counts
    assert len(made) - tries <= 1
    base = sqlite3.connect(tmp_path / "set" / "ledger.sqlite")
    (usd,) = base.execute("SELECT SUM(usd) FROM charges WHERE capped").fetchone()
    base.close()
    assert 5 < usd <= 8
    log.behave = lambda body, count: "ok"
    assert main(None, [*argv[:-1], "--json", "--max-cost", "60"]) == 0
    assert len((tmp_path / "set" / "instruct.json").read_text().split('"image"')) == 41


def prompt_tokens(body: Body) -> int:
    return sum(len(str(message["content"]).encode()) for message in body["messages"])


def test_a_judge_stays_under_the_cap_and_a_second_run_counts_the_first(log: ChatLog, tmp_path: Path) -> None:
    made: list[int] = []
    log.answer, log.behave = lambda body: "9 8", lambda body, count: failing(body, count, made)
    files = bench(tmp_path, 30)
    argv = [
        "score",
        "llava-bench",
        *options(files),
        "--judge-url",
        log.url,
        "--timeout",
        "0.3",
        "--concurrency",
        "2",
        "--price-in",
        "10",
        "--price-out",
        "1000",
    ]
    assert main(None, [*argv, "--max-cost", "5"]) == 1
    assert 3 < work_of(made, 1000, 2) <= 5
    tries = len(made)
    assert main(None, [*argv, "--max-cost", "5"]) == 1
    assert len(made) - tries <= 1
    assert main(None, [*argv, "--max-cost", "7"]) == 1
    assert 5 < work_of(made, 1000, 2) <= 7


def quick(log: ChatLog, **more: Any) -> ChatServer:
    return ChatServer(log.url, model="judge", **{"timeout": 5.0, "pause": 0.01, "retries": 3} | more)


def test_every_failed_try_is_reported_with_its_cost_and_another_may_be_refused(log: ChatLog) -> None:
    log.behave = lambda body, count: ("no choices, used", "500", "429", "ok")[min(count, 3)]
    reported: list[tuple[int, str, int | None, int | None]] = []

    def again(place: int, failure: ChatFailure) -> bool:
        reported.append((place, failure.reason[:8], failure.prompt_tokens, failure.completion_tokens))
        return len(reported) != 5

    found = dict(ask(quick(log, concurrency=1), [REQUEST], again))
    assert isinstance(found[0], ChatAnswer)
    assert reported == [(0, "malforme", 500, 700), (0, "HTTP 500", None, None), (0, "HTTP 429", 0, 0)]
    log.came.clear()
    refused = dict(ask(quick(log, concurrency=1), [REQUEST], again))[0]
    assert refused == ChatFailure("HTTP 500: refused with 500 for Bearer no-key, and the cap allows no further try")
    assert (refused.prompt_tokens, refused.completion_tokens) == (0, 0)
    assert len(log.requests) == 6


@pytest.mark.parametrize(
    ("kind", "usage"),
    [
        ("stall", (None, None)),
        ("html", (None, None)),
        ("no choices", (None, None)),
        ("no choices, used", (500, 700)),
        ("400", (0, 0)),
        ("503", (None, None)),
        ("408", (None, None)),
    ],
)
def test_a_failure_costs_the_reported_usage_or_an_unknown_amount(
    log: ChatLog, kind: str, usage: tuple[int | None, int | None]
) -> None:
    log.behave = lambda body, count: kind
    ((_, found),) = ask(quick(log, retries=0, timeout=0.3), [REQUEST])
    assert isinstance(found, ChatFailure)
    assert (found.prompt_tokens, found.completion_tokens) == usage


def test_a_failure_without_usage_costs_the_maximum() -> None:
    budget = Budget(price_in=1e6, price_out=1e3, max_cost=100.0, before=90.0)
    assert budget.take("a", REQUEST)  # 3 + 1 USD
    assert budget.again("a", REQUEST, ChatFailure("late"))
    assert budget.spent == pytest.approx(4.0)
    assert not budget.again("a", REQUEST, ChatFailure("cut", 2, None))
    assert budget.spent == pytest.approx(7.0)
    assert not budget.take("b", REQUEST)
    assert not budget.exhausted  # "a" is not settled yet
    budget.settle("a", REQUEST, ChatFailure("refused", 0, 0))
    assert not budget.take("b", REQUEST)
    assert (budget.exhausted, budget.spent, budget.requests) == (True, pytest.approx(7.0), 2)


def test_a_cap_on_requests_counts_retries(log: ChatLog, tmp_path: Path) -> None:
    log.answer, log.behave = teach, lambda body, count: "500"
    recipe = write_recipe(recipe_of(tmp_path, log.url, 40, teacher={"retries": 6}), tmp_path)
    assert main(None, ["generate-data", recipe, "--max-requests", "5"]) == 1
    assert len(log.requests) == 5


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("\u8fd9\u5f20\u56fe\u7247\u663e\u793a\u4e86\u4e00\u53ea\u732b", 12),  # Llama makes 1.5 tokens of a letter
        ("- person: 0.123, 0.456, 0.789, 0.912\n", 31),
        ("\U0001f600\U0001f389", 8),
        ("\u041d\u0430 \u044d\u0442\u043e\u0439", 5),
    ],
)
def test_estimates_are_not_below_llama_s_token_counts(text: str, least: int) -> None:
    assert least <= estimate_text_tokens(text) <= len(text.encode())


def test_english_is_estimated_at_most_a_third_too_high() -> None:
    text = "The judge is asked about two answers, and the two scores in what it writes."
    assert estimate_text_tokens(text) == 27  # Llama: 18
    assert estimate_tokens(ChatRequest([{"role": "user", "content": text}] * 2, 5)) == 54
