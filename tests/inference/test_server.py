"""Requests to OpenAI-compatible servers that work and that fail."""

from __future__ import annotations

import asyncio
import gc
import itertools
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from inference.chat_server import Body, ChatLog, chat_server, question_of

from lora_llava.core.errors import UserError
from lora_llava.inference.client.client import (
    ChatAnswer,
    ChatFailure,
    ChatRequest,
    ChatServer,
    ask,
)

KEY = "sk-a-key-that-nobody-sees"


def request(text: str, max_tokens: int = 10) -> ChatRequest:
    return ChatRequest([{"role": "user", "content": text}], max_tokens)


def quick(log: ChatLog, timeout: float = 5.0, retries: int = 1, **settings: object) -> ChatServer:
    return ChatServer(log.url, timeout=timeout, retries=retries, pause=0.01, **settings)  # type: ignore[arg-type]


def test_answers_have_token_counts(log: ChatLog) -> None:
    found = dict(ask(quick(log), [request(f"question {number}") for number in range(30)]))
    assert found == {n: ChatAnswer(f"answer to question {n}", 100, 4, "judge-0613") for n in range(30)}
    assert len(log.requests) == 30
    assert log.at_once <= 8


def test_request_bodies(log: ChatLog) -> None:
    messages = [{"role": "user", "content": "a"}]
    full = ChatRequest(messages, 7, temperature=0.5, top_p=0.9, stop="###", seed=3)
    bare = ChatRequest(messages, 7, temperature=None)
    list(ask(quick(log, concurrency=1), [full, bare, ChatRequest(messages, 7)]))
    sent = {"model": "judge", "messages": messages, "max_tokens": 7}
    assert log.requests[0] == sent | {"temperature": 0.5, "top_p": 0.9, "stop": "###", "seed": 3}
    assert log.requests[1:] == [sent, sent | {"temperature": 0.0}]


def test_requests_run_concurrently_up_to_the_limit(log: ChatLog) -> None:
    log.latency = 0.05
    list(ask(quick(log, concurrency=5), map(request, "abcdefghijklmno")))
    assert log.at_once == 5


def test_requests_per_minute_spreads_requests_evenly(log: ChatLog) -> None:
    start = time.monotonic()
    assert len(dict(ask(quick(log, requests_per_minute=600), map(request, "abcdef")))) == 6
    assert 0.5 <= time.monotonic() - start < 5


def test_requests_are_read_as_needed(log: ChatLog) -> None:
    read: list[str] = []

    def requests() -> Iterator[ChatRequest]:
        for letter in "abcdefghij":
            read.append(letter)
            yield request(letter)

    answers = ask(quick(log, concurrency=2), requests())
    for answered in range(1, 11):
        next(answers)
        assert len(read) <= answered + 1
    assert list(answers) == []


REFUSAL = "refused with {} for Bearer ***"
FAILURES = {
    "cut": "the connection broke (RemoteProtocolError)",
    "html": "malformed answer: no chat completion",
    "odd type": "malformed answer: no JSON",
    "list": "malformed answer: no chat completion",
    "number": "malformed answer: no chat completion",
    "no choices": "malformed answer: no choices",
    "no message": "malformed answer: no message",
    "nothing": "empty answer",
    "429": f"HTTP 429: {REFUSAL.format(429)}",
    "500": f"HTTP 500: {REFUSAL.format(500)}",
    "503": f"HTTP 503: {REFUSAL.format(503)}",
    "400": f"HTTP 400: {REFUSAL.format(400)}",
    "422": f"HTTP 422: {REFUSAL.format(422)}",
}
PERMANENT = {"400", "422"}
"""Failures that are not retried."""


def test_every_request_gets_an_answer_or_a_failure_from_a_server_that_fails_in_every_way(log: ChatLog) -> None:
    kinds = ["fine", "odd usage", *FAILURES] * 2
    log.behave = lambda body, count: "ok" if question_of(body) == "fine" else question_of(body)
    server = quick(log, timeout=30.0, retries=2, api_key=KEY, refuse_empty=True, concurrency=len(kinds))
    results = list(ask(server, map(request, kinds)))
    assert sorted(index for index, _ in results) == list(range(len(kinds)))
    expected = {kind: ChatFailure(reason) for kind, reason in FAILURES.items()} | {
        "fine": ChatAnswer("answer to fine", 100, 3, "judge-0613"),
        "odd usage": ChatAnswer("fine", 0, 0, "judge"),
    }
    assert {kinds[index]: found for index, found in results} == expected
    sent = Counter(question_of(body) for body in log.requests)
    assert sent == {kind: 2 if kind in PERMANENT | {"fine", "odd usage"} else 6 for kind in kinds}


@pytest.mark.parametrize("kind", ["stall", "dribble"])
def test_an_answer_that_is_incomplete_at_the_timeout_is_a_failure(log: ChatLog, kind: str) -> None:
    log.behave = lambda body, count: kind
    assert list(ask(quick(log, timeout=2.0), [request("a")])) == [(0, ChatFailure("no answer within 2 s"))]
    assert len(log.requests) == 2


@pytest.mark.parametrize("kind", ["stall", "cut", "html", "odd type", "no choices", "nothing", "429", "500", "408"])
def test_temporary_failures_are_retried(log: ChatLog, kind: str) -> None:
    log.behave = lambda body, count: kind if count < 2 else "ok"
    server = quick(log, timeout=1.0, retries=2, refuse_empty=True)
    assert list(ask(server, [request("a")])) == [(0, ChatAnswer("answer to a", 100, 3, "judge-0613"))]
    assert len(log.requests) == 3


def test_an_empty_answer_is_an_answer_by_default(log: ChatLog) -> None:
    log.behave = lambda body, count: "nothing"
    assert list(ask(quick(log), [request("a")])) == [(0, ChatAnswer("", 100, 1, "judge-0613"))]


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_respected(log: ChatLog, form: str) -> None:
    times: list[float] = []

    def behave(body: Body, count: int) -> str:
        times.append(time.time())
        if form == "date":
            log.retry_after = formatdate(time.time() + 2, usegmt=True)  # cut to whole seconds
        return "429" if count == 0 else "ok"

    log.behave, log.retry_after = behave, "0.6"
    assert isinstance(dict(ask(quick(log), [request("a")]))[0], ChatAnswer)
    assert times[1] - times[0] >= (0.6 if form == "seconds" else 0.9)


@pytest.mark.parametrize("header", ["3600", "inf", "nan"])
def test_a_retry_after_of_an_hour_is_a_refusal(log: ChatLog, header: str) -> None:
    log.behave, log.retry_after = lambda body, count: "429", header
    assert isinstance(dict(ask(quick(log, retries=5), [request("a")]))[0], ChatFailure)
    assert len(log.requests) == 1


def test_pauses_double(log: ChatLog) -> None:
    times: list[float] = []

    def behave(body: Body, count: int) -> str:
        times.append(time.time())
        return "500"

    log.behave = behave
    list(ask(ChatServer(log.url, retries=3, pause=0.1), [request("a")]))
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert all(pause >= least for pause, least in zip(pauses, (0.05, 0.1, 0.2), strict=True))


def test_a_lone_surrogate_is_a_failure(log: ChatLog) -> None:
    found = dict(ask(quick(log), [request("\ud83d"), request("a")]))
    assert found[0] == ChatFailure("the request contains a lone surrogate, which UTF-8 cannot encode")
    assert isinstance(found[1], ChatAnswer)


def test_max_completion_tokens_replaces_max_tokens_where_the_server_asks_for_it(log: ChatLog) -> None:
    log.behave = lambda body, count: "renamed" if "max_tokens" in body else "ok"
    found = dict(ask(quick(log, concurrency=2), map(request, "abc")))
    assert {index: type(answer) for index, answer in found.items()} == dict.fromkeys(range(3), ChatAnswer)
    assert [body.get("max_completion_tokens") for body in log.requests][-3:] == [10, 10, 10]


def test_response_format_is_dropped_for_a_server_without_it(log: ChatLog) -> None:
    log.behave = lambda body, count: "no format" if "response_format" in body else "ok"
    schema = {"type": "json_schema", "json_schema": {"name": "sample", "strict": True, "schema": {"type": "object"}}}
    requests = [
        ChatRequest([{"role": "user", "content": text}], 10, response_format=schema, key=text) for text in "abc"
    ]
    found = dict(ask(quick(log, concurrency=2), requests))
    assert {index: type(answer) for index, answer in found.items()} == dict.fromkeys(range(3), ChatAnswer)
    assert [body.get("response_format") for body in log.requests[:1]] == [schema]
    assert "response_format" not in log.requests[-1]
    assert set(log.idempotency_keys) == {"a", "b", "c"}


def test_requests_inside_a_running_event_loop(log: ChatLog) -> None:
    """As in a notebook; the first generator is closed early."""

    async def notebook() -> list[int]:
        answers = ask(quick(log), map(request, "abcdef"))
        first = [index for index, _ in itertools.islice(answers, 2)]
        answers.close()
        return first + sorted(index for index, _ in ask(quick(log), map(request, "abc")))

    assert asyncio.run(notebook())[2:] == [0, 1, 2]
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("chat")] == []


def error_of(server: ChatServer, count: int = 40) -> str:
    with pytest.raises(UserError) as error:
        list(ask(server, map(request, "a" * count)))
    assert "\n" not in str(error.value)
    assert KEY not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("status", ["401", "403"])
def test_a_refused_key_stops_at_once(log: ChatLog, status: str, capsys: pytest.CaptureFixture[str]) -> None:
    log.behave = lambda body, count: status
    message = error_of(quick(log, model="judge", api_key=KEY))
    assert message == f"{log.url} refuses the key (HTTP {status}); set OPENAI_API_KEY to a valid one"
    assert len(log.requests) <= 8


def test_a_key_that_is_refused_for_the_list_of_models(log: ChatLog) -> None:
    log.refuse_list = True
    assert "refuses the key (HTTP 401)" in error_of(quick(log))
    assert log.requests == []


def test_one_forbidden_request_is_a_failure(log: ChatLog) -> None:
    log.behave = lambda body, count: "403" if question_of(body) == "b" else "ok"
    found = dict(ask(quick(log, concurrency=1), map(request, "abc")))
    assert [type(found[index]) for index in range(3)] == [ChatAnswer, ChatFailure, ChatAnswer]


def test_an_unreachable_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    for server in (ChatServer(url), ChatServer(url, model="judge")):
        message = error_of(server)
        assert message.startswith(f"{url}/v1 cannot be reached (")
        assert message.endswith("); start the server, or fix the URL")


def test_a_server_that_goes_away_stops_the_requests() -> None:
    with chat_server() as log:
        answers = ask(quick(log, concurrency=1, reconnect=0.0), map(request, "abcdef"))
        assert isinstance(next(answers)[1], ChatAnswer)
    with pytest.raises(UserError, match="cannot be reached"):
        list(answers)


def test_closing_cancels_requests_in_flight_and_leaves_no_thread_or_socket(log: ChatLog) -> None:
    log.behave = lambda body, count: "ok" if question_of(body) == "a" else "stall"
    answers = ask(quick(log, timeout=60), map(request, "abcdef"))
    assert isinstance(next(answers)[1], ChatAnswer)
    start = time.monotonic()
    answers.close()
    assert time.monotonic() - start < 5  # not the timeout
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("chat")] == []
    gc.collect()  # an open socket would warn here


def test_large_and_non_ascii_requests(log: ChatLog) -> None:
    texts = ["a" * 3_000_000, "\u00e9\U0001f436"]
    found = dict(ask(quick(log), map(request, texts)))
    assert [found[index].text for index in range(2)] == [f"answer to {text}" for text in texts]  # type: ignore[union-attr]


def test_no_requests(log: ChatLog) -> None:
    assert list(ask(quick(log), [])) == []
    assert log.requests == []


def test_an_unreachable_server_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        list(ask(ChatServer("http://127.0.0.1:9/v1", model="m", retries=0), map(request, "abcdef")))
    gc.collect()
    assert capfd.readouterr().err == ""


def test_a_host_with_two_addresses_that_is_unreachable() -> None:
    """The errors of ::1 and 127.0.0.1 may arrive as a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://localhost:{free.getsockname()[1]}"
    assert "cannot be reached" in error_of(ChatServer(url, model="judge"))


def test_an_error_in_the_iterator_of_requests_reaches_the_caller(log: ChatLog) -> None:
    def requests() -> Iterator[ChatRequest]:
        yield request("a")
        raise UserError("image 3.png is missing")

    with pytest.raises(UserError, match=r"image 3.png is missing"):
        list(ask(quick(log), requests()))
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("chat")] == []


def test_ctrl_c_stops_at_once(log: ChatLog, tmp_path: Path) -> None:
    log.behave = lambda body, count: "stall"
    script = tmp_path / "script.py"
    script.write_text(
        "from lora_llava.inference.client.client import ChatRequest, ChatServer, ask\n"
        "messages = [{'role': 'user', 'content': 'a'}]\n"
        f"list(ask(ChatServer({log.url!r}, timeout=60), [ChatRequest(messages, 5)] * 20))\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True) as process:
        while log.working < 8 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(2)
        _, errors = process.communicate(timeout=20)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert len(log.requests) == 8
