"""Asking by a process of its own: the same answers, and an end with whoever asks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from inference.chat_server import ChatLog, question_of

from lora_llava.core.errors import UserError
from lora_llava.inference.client import ChatAnswer, ChatFailure, ChatRequest, ChatServer, ask
from lora_llava.inference.client_process import ask_apart


def request(text: str) -> ChatRequest:
    return ChatRequest([{"role": "user", "content": text}], 10)


def quick(log: ChatLog, **settings: object) -> ChatServer:
    return ChatServer(log.url, timeout=5.0, retries=1, pause=0.01, **settings)  # type: ignore[arg-type]


def senders() -> list[psutil.Process]:
    """This process's children that send requests."""
    found = psutil.Process().children(recursive=True)
    return [each for each in found if "lora_llava.inference.client_process" in each.cmdline()]


def test_the_answers_are_those_of_this_process(log: ChatLog) -> None:
    log.behave = lambda body, count: "500" if question_of(body).endswith("7") else "ok"
    texts = [f"question {number}" for number in range(60)] + ["a" * 3_000_000, "\u00e9\U0001f436"]
    apart = dict(ask_apart(quick(log), map(request, texts)))
    assert apart == dict(ask(quick(log), map(request, texts)))
    assert sum(isinstance(found, ChatFailure) for found in apart.values()) == 6
    assert log.at_once <= 8
    assert senders() == []


def test_no_more_is_drawn_than_there_is_room_for(log: ChatLog) -> None:
    drawn: list[str] = []

    def requests() -> Iterator[ChatRequest]:
        for number in range(100):
            drawn.append(str(number))
            yield request(str(number))

    for count, (_, found) in enumerate(ask_apart(quick(log, concurrency=2), requests())):
        assert isinstance(found, ChatAnswer)
        assert len(drawn) - count <= 2 + 16
    assert len(drawn) == 100
    assert list(ask_apart(quick(log), [])) == []


def test_what_no_request_can_pass_ends_it(log: ChatLog) -> None:
    log.behave = lambda body, count: "401"
    with pytest.raises(UserError, match=r"refuses the key \(HTTP 401\)"):
        list(ask_apart(quick(log, model="judge"), map(request, "abcdef")))
    assert senders() == []


def test_the_sender_ends_without_a_word_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    """Three calls, as what a thread says at the end comes now and then."""
    for _ in range(3):
        with pytest.raises(UserError, match="cannot be reached"):
            list(ask_apart(ChatServer("http://127.0.0.1:9/v1", model="m", retries=0), map(request, "abcdef")))
    assert capfd.readouterr().err == ""


def test_a_mistake_among_the_requests_reaches_the_caller(log: ChatLog) -> None:
    def requests() -> Iterator[ChatRequest]:
        yield request("a")
        raise UserError("image 3.png is missing")

    with pytest.raises(UserError, match=r"image 3.png is missing"):
        list(ask_apart(quick(log), requests()))
    assert senders() == []


def test_left_in_the_middle_it_ends(log: ChatLog) -> None:
    log.behave = lambda body, count: "ok" if question_of(body) == "a" else "stall"
    answers = ask_apart(quick(log, concurrency=3), map(request, "abcdef"))
    assert next(answers)[0] == 0
    start = time.monotonic()
    answers.close()
    assert time.monotonic() - start < 4  # well below the server's own 5
    assert senders() == []


def test_a_sender_that_is_killed_is_told(log: ChatLog) -> None:
    log.behave = lambda body, count: "ok" if question_of(body) == "a" else "stall"
    answers = ask_apart(quick(log, concurrency=3), map(request, "abcdef"))
    next(answers)
    (sender,) = senders()
    sender.kill()
    with pytest.raises(RuntimeError, match=r"ended by itself \(exit status -9\)"):
        list(answers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_it_ends_with_its_caller(log: ChatLog, tmp_path: Path, number: signal.Signals) -> None:
    log.behave = lambda body, count: "stall"
    script = tmp_path / "script.py"  # without `if __name__`, as people write them
    script.write_text(
        "from lora_llava.inference.client import ChatRequest, ChatServer\n"
        "from lora_llava.inference.client_process import ask_apart\n"
        "messages = [{'role': 'user', 'content': 'a'}]\n"
        f"list(ask_apart(ChatServer({log.url!r}, timeout=60), [ChatRequest(messages, 5)] * 20))\n"
    )
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while log.working < 8 and process.poll() is None:
            time.sleep(0.01)
        (sender,) = psutil.Process(process.pid).children()
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as the terminal does, to both
        else:
            process.kill()
        _, told = process.communicate(timeout=20)
    assert told.count("KeyboardInterrupt") == (number == signal.SIGINT)
    assert psutil.wait_procs([sender], timeout=10)[1] == []
