"""A server that is down for a while costs no request."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest
from inference.chat_server import Body, ChatLog, chat_server
from inference.test_server import quick, request

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.inference.client.client import ChatAnswer, ChatFailure, ask


def _port(log: ChatLog) -> int:
    return int(log.url.split(":")[2].split("/")[0])


def test_requests_of_a_server_that_restarts_are_all_answered(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten requests, four in flight when the server goes away for 0.6 s; no retry is allowed."""
    with ExitStack() as later:
        again: list[tuple[int, ChatFailure]] = []
        with chat_server() as log:
            log.gate = 3
            server = quick(log, retries=0, concurrency=4, reconnect=30.0)
            answers = ask(
                server, map(request, "abcdefghij"), lambda place, failure: again.append((place, failure)) is None
            )
            found = dict(next(answers) for _ in range(3))
        thread = threading.Timer(0.6, lambda: later.enter_context(chat_server(_port(log))))
        thread.start()
        with progress_bar(desc="asking", total=10):
            found |= dict(answers)
        thread.join()
    assert found == {
        n: ChatAnswer(f"answer to {letter}", 100, 3, "judge-0613") for n, letter in enumerate("abcdefghij")
    }
    assert all(failure.reason.startswith("the connection broke (") for _, failure in again)
    shown = capsys.readouterr().err
    assert f"{log.url} is down; waiting up to 30 s for it" in shown
    assert f"{log.url} responds again after 1 s; the work goes on" in shown
    assert shown.count("is down") == 1


def test_a_server_that_stays_away_stops_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    with chat_server() as log:
        answers = ask(quick(log, concurrency=1, reconnect=0.2), map(request, "abcdef"))
        assert isinstance(next(answers)[1], ChatAnswer)
    with pytest.raises(UserError, match="cannot be reached for 0 s; start the server and run the same command again"):
        list(answers)
    assert "is down; waiting up to 0 s" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["cut", "503"])
def test_failures_of_a_server_that_is_up_count_as_retries(log: ChatLog, kind: str) -> None:
    log.behave = lambda body, count: kind if "bad" in str(body) else "ok"
    found = dict(ask(quick(log, retries=2, concurrency=1), map(request, ["good", "bad"])))
    assert isinstance(found[1], ChatFailure)
    assert len(log.requests) == 1 + 3


def test_a_gateway_without_its_server_is_waited_for(log: ChatLog) -> None:
    """A gateway that answers 503 to everything, its list of models included, until the server is back."""
    down = threading.Event()

    def behave(body: Body, count: int) -> str:
        if "b" in str(body["messages"]) and count == 0:
            down.set()
            log.gone_until = time.monotonic() + 0.3
        return "503" if log.gone_until > time.monotonic() else "ok"

    log.behave = behave
    found = dict(ask(quick(log, retries=0, concurrency=1), map(request, "abc")))
    assert down.is_set()
    assert [type(found[place]) for place in range(3)] == [ChatAnswer] * 3
