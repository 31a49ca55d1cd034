"""The page of `lora-llava chat --web`, in a browser and by HTTP."""

from __future__ import annotations

import html
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from browser import Browser, find_chromium
from PIL import Image

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.inference.open_model import open_speaker
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.speak import Speaker, stream_answer, text_message, user_message
from lora_llava.inference.web.page import _answer
from lora_llava.inference.web.web_address import check_address, is_loopback
from tests.inference.small_runs import draw_image, write_base

gradio = pytest.importorskip("gradio", reason="the extra [web] is not installed")

SYSTEM = "Be brief."
TOKENS = 150
WATCHED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
def watch(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        print("connected to", args[1][0], file=sys.stderr, flush=True)
    if event == "socket.getaddrinfo":
        print("looked up", args[0], file=sys.stderr, flush=True)
sys.addaudithook(watch)
from lora_llava.commands.main import console_main
console_main()
"""
"""The command, with every address that it connects to or looks up printed on stderr. Ctrl-C is enabled; a shell that
runs these tests in the background makes its children ignore it."""


@pytest.fixture(scope="module")
def base(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(parts, tmp_path_factory.mktemp("base") / "llava")


@pytest.fixture(scope="module")
def speaker(base: str) -> Speaker:
    return open_speaker(base, template="vicuna_v1")


class Served:
    """The command in a separate process, on any free port."""

    def __init__(self, base: str, folder: Path, *more: str) -> None:
        self.log = folder / "stderr.txt"
        options = [*more, "--template", "vicuna_v1", "--system", SYSTEM, "--max-new-tokens", str(TOKENS), "--port", "0"]
        environment = os.environ | {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1", "HOME": str(folder)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WATCHED, "chat", base, "--web", *options],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if " is at http://127.0.0.1:" not in line:
            self.close()
            pytest.fail(f"the page is not served: {line}{self.log.read_text()}")
        self.url = line.split(" is at ")[1].split(",")[0]

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def served(base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(base, tmp_path_factory.mktemp("web"))
    yield served
    served.close()


@pytest.fixture(scope="module")
def browser(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("Chromium is not installed")
    browser = Browser(executable, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def expected(speaker: Speaker, *messages: Any, tokens: int = TOKENS) -> str:
    return "".join(stream_answer(speaker, [text_message("system", SYSTEM), *messages], Sampling(max_new_tokens=tokens)))


# --- in a browser --------------------------------------------------------------------------------------------------

ANSWERS = "[...document.querySelectorAll('#chat [data-testid=bot]')].map(e => e.textContent)"
QUESTIONS = "[...document.querySelectorAll('#chat [data-testid=user]')].map(e => e.textContent)"
BOX = "document.querySelector('#message textarea')"
STOP = "document.querySelector('#message .stop-button')"
IDLE = f"!{STOP} && !!document.querySelector('#chat [data-testid=status-tracker].hide')"
"""Gradio sends the last state twice; the request has ended only after the second."""
TOAST = "[...document.querySelectorAll('.toast-body')].map(e => e.textContent).join(' ')"


@pytest.fixture
def page(browser: Browser, served: Served) -> Browser:
    """The page, just opened."""
    browser.open("about:blank")
    browser.open(served.url)
    browser.wait_for(f"!!{BOX}")
    return browser


def ask(page: Browser, text: str, image: Path | None = None) -> None:
    if image is not None:
        page.choose_files("#message input[type=file]", [image])
        page.wait_for("!!document.querySelector('#message .thumbnail-item, #message img')")
    page.evaluate(f"{BOX}.focus()")
    page.type(text)
    page.wait_for(f"{BOX}.value == {json.dumps(text)}")
    page.press_enter()


def finished(page: Browser, answers: int = 1) -> list[str]:
    """Return the model's answers, once there are so many of them and the page waits."""
    page.wait_for(f"{ANSWERS}.length == {answers} && {IDLE}", 60)
    return list(page.evaluate(ANSWERS))


def test_a_question_about_an_image_is_answered_in_a_stream(page: Browser, speaker: Speaker, tmp_path: Path) -> None:
    image = draw_image(tmp_path / "red.png")
    ask(page, "Which <b>colour</b>?", image)
    lengths = {0}
    while page.evaluate(f"!{ANSWERS}.length || !!{STOP}"):
        lengths.add(page.evaluate(f"({ANSWERS}[0] || '').length"))
    question = user_message("Which <b>colour</b>?", [Image.open(image)])
    answer = expected(speaker, question)
    assert len(answer) > 200
    assert finished(page) == [answer]
    assert len(lengths - {0, len(answer)}) >= 2
    assert page.evaluate(QUESTIONS)[-1] == "Which <b>colour</b>?"
    assert page.evaluate("document.querySelectorAll('#chat b').length") == 0
    assert page.evaluate("document.querySelector('#chat img').naturalWidth") == 40
    ask(page, "Sure?")
    turns = (question, text_message("assistant", answer), user_message("Sure?"))
    assert finished(page, 2) == [answer, expected(speaker, *turns)]
    page.evaluate("document.querySelector('#clear').click()")
    page.wait_for(f"{ANSWERS}.length == 0")
    ask(page, "Sure?")
    assert finished(page) == [expected(speaker, user_message("Sure?"))]


def test_a_stopped_answer_is_kept_up_to_there(page: Browser, speaker: Speaker) -> None:
    ask(page, "Hello")
    page.wait_for(f"({ANSWERS}[0] || '').length > 3")
    page.evaluate(f"{STOP}.click()")
    (answer,) = finished(page)
    complete = expected(speaker, user_message("Hello"))
    assert answer != complete
    assert complete.startswith(answer)
    ask(page, "Sure?")
    turns = (user_message("Hello"), text_message("assistant", answer), user_message("Sure?"))
    assert finished(page, 2) == [answer, expected(speaker, *turns)]


def test_a_message_that_cannot_be_answered_goes_back_into_its_box(page: Browser, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    ask(page, "What is it?", tmp_path / "broken.png")
    page.wait_for(f"{TOAST}.includes('image broken.png cannot be read: it is not an image, or of an unknown format')")
    page.wait_for(f"{BOX}.value == 'What is it?' && {IDLE}")
    assert page.evaluate(QUESTIONS) == []
    page.wait_for("document.querySelectorAll('#message .thumbnail-item').length == 1")
    page.evaluate("document.querySelector('#message .thumbnail-item .delete-button').click()")
    page.wait_for("document.querySelectorAll('#message .thumbnail-item').length == 0")
    page.evaluate(f"{BOX}.select()")
    long = "word " * 600
    ask(page, long)
    page.wait_for(f"{TOAST}.includes('shorten the message or start a new conversation with “New conversation”')")
    page.wait_for(f"{BOX}.value == {json.dumps(long.strip())} && {IDLE}")
    assert page.evaluate(QUESTIONS) == []


def test_a_new_conversation_during_an_answer_stays_empty_and_leaves_the_box_alone(
    page: Browser, speaker: Speaker
) -> None:
    for _ in range(3):  # a late piece would show up in some of the attempts
        ask(page, "Hello")
        page.wait_for(f"({ANSWERS}[0] || '').length > 3")
        page.evaluate(f"{BOX}.focus()")
        page.type("Sure?")
        page.evaluate("document.querySelector('#clear').click()")
        page.wait_for(f"{ANSWERS}.length == 0 && {IDLE}")
        time.sleep(0.3)
        assert (page.evaluate(ANSWERS), page.evaluate(QUESTIONS), page.evaluate(f"{BOX}.value")) == ([], [], "Sure?")
        page.evaluate(f"{BOX}.select()")
    ask(page, "Sure?")
    assert finished(page) == [expected(speaker, user_message("Sure?"))]


def test_a_long_conversation_scrolls_inside_the_page(page: Browser) -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=420, height=760, deviceScaleFactor=1, mobile=False)
    try:
        for number, text in enumerate(("Hello", "Sure?"), 1):
            ask(page, text)
            finished(page, number)
        log = "document.querySelector('#chat .bubble-wrap')"
        assert page.evaluate(f"{log}.scrollHeight > {log}.clientHeight + 50")
        page.wait_for(f"{log}.scrollTop + {log}.clientHeight > {log}.scrollHeight - 40")
        assert page.evaluate(f"{BOX}.getBoundingClientRect().bottom < innerHeight")
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")


def test_the_page_requests_nothing_from_other_machines(page: Browser) -> None:
    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            reached.append(self.path)
            self.send_response(204)
            self.end_headers()

    reached: list[str] = []
    server = HTTPServer(("127.0.0.1", 0), Elsewhere)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        send = f"fetch('http://127.0.0.1:{server.server_port}/', {{method: 'POST', mode: 'no-cors'}})"
        assert page.evaluate(f"{send}.then(() => 'sent', () => 'refused')") == "refused"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert reached == []
    requested = [urlsplit(url) for url in page.requested()]
    assert len(requested) > 50
    assert {url.hostname for url in requested if url.scheme not in ("data", "blob", "about")} == {"127.0.0.1"}


# --- as a program --------------------------------------------------------------------------------------------------


def upload(served: Served, content: bytes, name: str = "a.png") -> httpx.Response:
    return httpx.post(f"{served.url}gradio_api/upload", files={"files": (name, content)}, timeout=60)


def call(served: Served, message: dict[str, Any], history: list[Any], *settings: float) -> Any:
    """Return the last state that `/chat` sends; None if it fails."""
    started = httpx.post(f"{served.url}gradio_api/call/chat", json={"data": [message, history, *settings]}, timeout=60)
    with httpx.stream("GET", f"{served.url}gradio_api/call/chat/{started.json()['event_id']}", timeout=60) as answer:
        events = answer.read().decode().strip().split("\n\n")
    event, data = events[-1].split("\n", 1)
    assert event in ("event: complete", "event: error")
    return json.loads(data.removeprefix("data: ")) if event == "event: complete" else None


def test_a_question_by_http_is_answered(served: Served, speaker: Speaker, tmp_path: Path) -> None:
    image = draw_image(tmp_path / "red.png")
    (path,) = upload(served, image.read_bytes()).json()
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    history, _ = call(served, {"text": "Which?", "files": [file]}, [], 0, 1, 12)
    answer = expected(speaker, user_message("Which?", [Image.open(image)]), tokens=12)
    assert [turn["role"] for turn in history] == ["user", "assistant"]
    assert [html.unescape(part["text"]) for part in history[1]["content"]] == [answer]


def test_only_uploads_are_served_and_large_ones_are_rejected(served: Served, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in ("/etc/passwd", secret, "stderr.txt"):
        assert httpx.get(f"{served.url}gradio_api/file={path}").status_code == 403
    assert upload(served, b"x" * (65 << 20)).status_code == 413
    stolen = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    turn = {"role": "user", "content": [{"type": "file", "file": stolen}]}
    for message, history in (({"text": "", "files": [stolen]}, []), ({"text": "Hi", "files": []}, [turn])):
        assert call(served, message, history, 0, 1, 9) is None


def test_after_an_error_of_the_model_the_message_is_back_in_its_box(
    speaker: Speaker, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    hook = speaker.model.register_forward_pre_hook(fail)
    message = {"text": "Hello?", "files": []}
    try:
        with pytest.warns(UserWarning, match="RuntimeError: broken"):
            states = list(_answer(gradio, speaker, message, [], Sampling(), None, threading.Event()))
    finally:
        hook.remove()
    conversation, box = states[-1]
    assert (conversation, box.value["text"], box.submit_btn, box.stop_btn) == ([], "Hello?", True, False)
    assert "RuntimeError: broken" in capsys.readouterr().err


# --- the command ---------------------------------------------------------------------------------------------------


def test_addresses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.1.2.3")] == [True] * 5
    assert [is_loopback(host) for host in ("0.0.0.0", "192.168.1.2", "::", "example.org")] == [False] * 4
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} is in use; choose another, or 0 for any free one"):
            check_address("127.0.0.1", port)
        assert main(None, ["chat", str(tmp_path), "--web", "--port", str(port)]) == 2
    assert capsys.readouterr().err == f"error: --port {port} is in use; choose another, or 0 for any free one\n"
    assert check_address("127.0.0.1", port) == port
    assert check_address("127.0.0.1", 0) > 1023
    with pytest.raises(UserError, match="--port 70000 is not a port"):
        check_address("127.0.0.1", 70000)
    with pytest.raises(UserError, match=r"--host nowhere\.invalid is unknown; use an address of this machine"):
        check_address("nowhere.invalid", 0)


def test_a_public_address_gets_a_warning_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(None, ["chat", str(tmp_path), "--web", "--host", "0.0.0.0", "--port", "0"]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: anyone who can reach 0.0.0.0 port ")
    assert error.startswith(f"error: {tmp_path} is neither a finished run")


def test_without_gradio_or_with_an_old_one_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as old:
        old.setattr("gradio.__version__", "6.9.3")
        assert main(None, ["chat", "x", "--web"]) == 2
    assert capsys.readouterr().err == (
        "error: --web needs a newer gradio than 6.9.3; pip install -U 'lora_llava[web]'\n"
    )
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(None, ["chat", "x", "--web"]) == 2
    assert capsys.readouterr().err == "error: --web needs gradio; pip install 'lora_llava[web]'\n"


def test_ctrl_c_stops_the_server_and_removes_uploads(served: Served, speaker: Speaker, tmp_path: Path) -> None:
    folder = served.log.parent
    upload(served, draw_image(tmp_path / "red.png").read_bytes())
    assert list(folder.glob("lora_llava_chat_*/*/*.png")) != []
    before = served.log.read_text()
    assert served.end(signal.SIGINT) == 0
    log = served.log.read_text()
    assert log == before
    assert list(folder.glob("lora_llava_chat_*")) == []
    hosts = {line.split()[-1] for line in log.splitlines() if line.startswith(("connected to", "looked up"))}
    assert hosts - {"127.0.0.1", "None"} == set()
    assert "connected to 127.0.0.1" in log


@pytest.mark.slow
def test_settings_outside_the_sliders_are_accepted_and_sigterm_removes_uploads(base: str, tmp_path: Path) -> None:
    served = Served(base, tmp_path, "--temperature", "3.5", "--top-p", "0.01")
    try:
        components = httpx.get(f"{served.url}config").json()["components"]
        sliders = [found["props"] for found in components if found["type"] == "slider"]
        ends = [(found["minimum"], found["value"], found["maximum"]) for found in sliders]
        assert ends == [(0, 3.5, 3.5), (0.01, 0.01, 1), (1, TOKENS, 512)]
        (path,) = upload(served, draw_image(tmp_path / "red.png").read_bytes()).json()
        assert Path(path).is_file()
        assert served.end(signal.SIGTERM) == 0
    finally:
        served.close()
    assert list(tmp_path.glob("lora_llava_chat_*")) == []
    assert "Traceback" not in served.log.read_text()
