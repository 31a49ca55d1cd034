"""A loopback server of OpenAI's chat API, with faults on request."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


def question_of(body: Body) -> str:
    """Return the text of a request's last message."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


class ChatLog:
    """The behaviour of a server and what it has received.

    Attributes:
        answer: Returns the text for a request.
        behave: Returns `ok`, a fault of `Handler.fault` or a status for a request and its number of earlier arrivals.
        models: Names in its list of models.
        refuse_list: Whether it refuses to list them.
        gone_until: Time (`time.monotonic`) until which the list of models is answered with 503.
        latency: Seconds before every answer.
        requests: Bodies in the order of their arrival.
        answered: How often each body's answer was written in full.
        keys: Authorization headers.
        idempotency_keys: Of the requests, in the order of their arrival.
        charged: Paid answers by body; the same `Idempotency-Key` is charged once.
        at_once: Most requests in progress at the same time.
        retry_after: Header of a 429.
        gate: Number of complete answers before it stalls; None for all.
    """

    def __init__(self) -> None:
        self.answer: Callable[[Body], str] = lambda body: f"answer to {question_of(body)}"
        self.behave: Callable[[Body, int], str] = lambda body, count: "ok"
        self.models = ["judge"]
        self.refuse_list = False
        self.gone_until = 0.0
        self.latency = 0.0
        self.requests: list[Body] = []
        self.answered: Counter[str] = Counter()
        self.keys: set[str | None] = set()
        self.idempotency_keys: list[str | None] = []
        self.charged: Counter[str] = Counter()
        self.at_once = 0
        self.retry_after: str | None = None
        self.gate: int | None = None
        self.url = ""
        self.lock = threading.Lock()
        self.closed = threading.Event()
        self.working = 0
        self.known: set[str | None] = set()
        self.came: Counter[str] = Counter()
        self.given = 0

    def enter(self, body: Body) -> int:
        with self.lock:
            key = json.dumps(body, sort_keys=True)
            before = self.came[key]
            self.came[key] += 1
            self.requests.append(body)
            self.working += 1
            self.at_once = max(self.at_once, self.working)
            return before

    def charge(self, body: Body, key: str | None) -> None:
        with self.lock:
            if key is None or key not in self.known:
                self.charged[json.dumps(body, sort_keys=True)] += 1
            self.known.add(key)

    def leave(self) -> None:
        with self.lock:
            self.working -= 1

    def may_answer(self) -> bool:
        with self.lock:
            if self.gate is not None and self.given >= self.gate:
                return False
            self.given += 1
            return True


class Handler(BaseHTTPRequestHandler):
    log: ChatLog
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.log.keys.add(self.headers.get("Authorization"))
        if time.monotonic() < self.log.gone_until:
            self.send(503, b'{"error": {"message": "loading"}}')
        elif self.log.refuse_list:
            self.send(401, b'{"error": {"message": "no"}}')
        elif self.path == "/v1/models":
            names = [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in self.log.models]
            self.send(200, json.dumps({"object": "list", "data": names}).encode())
        else:
            self.send(404, b'{"error": {"message": "no such page"}}')

    def do_POST(self) -> None:
        log = self.log
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if log.closed.is_set():  # the connection outlives the listening socket
            self.close_connection = True
            return
        log.keys.add(self.headers.get("Authorization"))
        log.idempotency_keys.append(self.headers.get("Idempotency-Key"))
        before = log.enter(body)
        try:
            kind = log.behave(body, before)
            if body["model"] not in log.models:
                kind = "404"
            if kind == "ok" and (self.is_gone() or not log.may_answer()):
                kind = "stall"
            if log.latency:
                time.sleep(log.latency)
            if kind == "ok":
                log.charge(body, self.headers.get("Idempotency-Key"))
                self.chat(log.answer(body))
                with log.lock:
                    log.answered[json.dumps(body, sort_keys=True)] += 1
            else:
                self.fault(kind)
        finally:
            log.leave()

    def chat(self, text: Any) -> None:
        words = len(str(text).split())
        usage = {"prompt_tokens": 100, "completion_tokens": words, "total_tokens": 100 + words}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        content = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge-0613", "choices": [choice]}
        self.send(200, json.dumps(content | {"usage": usage}).encode())

    def fault(self, kind: str) -> None:
        if kind == "stall":
            while not self.log.closed.wait(0.02) and not self.is_gone():
                pass
            self.close_connection = True
        elif kind == "dribble":
            self.dribble()
        elif kind == "cut":
            self.head(200, 5000)
            self.wfile.write(b'{"id": "1", "choices": [')
            self.close_connection = True
        elif kind == "html":
            self.send(200, b"<html>Welcome</html>", "text/html")
        elif kind == "odd type":
            self.send(200, b"half of a proxy's", "application/json; charset=utf-8")
        elif kind in ODD:
            self.send(200, json.dumps(ODD[kind]).encode())
        elif kind == "nothing":
            self.chat(None)
        elif kind == "no format":
            self.send(400, b'{"error": {"message": "response_format.type json_schema is not known here"}}')
        elif kind == "renamed":
            self.send(400, b'{"error": {"message": "max_tokens is unknown here. Use max_completion_tokens."}}')
        else:
            error = {"error": {"message": f"refused with {kind}\nfor {self.headers['Authorization']}"}}
            self.send(int(kind), json.dumps(error).encode())

    def is_gone(self) -> bool:
        """Check whether the client has closed the connection."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def dribble(self) -> None:
        """Send a byte every 50 ms, for ever, so that no read timeout ends the connection."""
        self.head(200, 10_000)
        while not self.log.closed.wait(0.05):
            self.wfile.write(b" ")
            self.wfile.flush()

    def head(self, status: int, length: int, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        if status == 429 and self.log.retry_after is not None:
            self.send_header("Retry-After", self.log.retry_after)
        self.end_headers()

    def send(self, status: int, content: bytes, kind: str = "application/json") -> None:
        self.head(status, len(content), kind)
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, *args: Any) -> None:
        pass


ODD: dict[str, Any] = {
    "list": [1, 2],
    "number": 5,
    "no choices": {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []},
    "no choices, used": {"choices": [], "usage": {"prompt_tokens": 500, "completion_tokens": 700}},
    "no message": {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [{"index": 0}]},
    "odd usage": {"id": "1", "choices": [{"message": {"content": "fine"}}], "usage": "much"},
}
"""JSON bodies that are not an answer, except for the last."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that close the connection."""


@contextmanager
def chat_server(port: int = 0) -> Iterator[ChatLog]:
    """Run a server within the block, at a free port unless one is given.

    Yields:
        The log, whose `url` is the API's; its behaviour can be changed at any time.
    """
    log = ChatLog()
    server = _Server(("127.0.0.1", port), type("ChatHandler", (Handler,), {"log": log}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    log.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield log
    finally:
        log.closed.set()
        server.shutdown()
        thread.join()
        server.server_close()
