"""Send requests to an OpenAI-compatible chat server (vLLM, SGLang, Ollama, OpenAI), several at once."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import openai

from lora_llava.core.errors import UserError
from lora_llava.inference.client.chat_errors import (
    NoAnswerError,
    Usage,
    rejects_response_format,
    reported_details,
    reported_usage,
    retry_after,
    root_cause,
    text_of,
    usage_of_refusal,
)
from lora_llava.inference.client.chat_request import ChatAnswer, ChatFailure, ChatRequest, image_part
from lora_llava.inference.client.chat_server import NO_KEY, ChatServer
from lora_llava.inference.client.outage import DOWN, Outage

__all__ = ["Again", "ChatAnswer", "ChatFailure", "ChatRequest", "ChatServer", "ask", "find_model", "image_part"]

_LONGEST_PAUSE = 30.0
_STEPS_TO_SEND = 5
"""Turns of the event loop after which a new request is in its socket (measured with openai 3 and httpx)."""
_SPACING = 0.001
"""Seconds between the starts of two requests, about the time to send one. Requests that start together are answered
together and then wait for one another (32 at once, 50 ms each: 72% of the ideal rate, 94% when spaced)."""
_PROBE_TIMEOUT = 10.0
_UNREACHABLE = (ConnectionRefusedError, socket.gaierror)


def find_model(server: ChatServer) -> ChatServer:
    """Fill in the model's name from a server that has only one model.

    Args:
        server: Returned unchanged if its model is named.

    Returns:
        The server with its model named.

    Raises:
        UserError: If the server cannot be reached, refuses the key, or has no model or several.
    """
    if server.model is not None:
        return server
    try:
        with openai.OpenAI(**_client_settings(server)) as client:
            names = [model.id for model in client.models.list()]
    except openai.APIStatusError as error:
        raise _refusal(server, error.status_code) from None
    except openai.APIConnectionError as error:
        raise _not_reached(server, error) from None
    except (openai.OpenAIError, ValueError, TypeError, AttributeError):
        raise UserError(f"{server.url} does not list its models; name the model, or fix the URL") from None
    if len(names) != 1:
        found = f"{len(names)} models; name one: {_listed(names)}" if names else "no model; load one there"
        raise UserError(f"{server.url} has {found}")
    return replace(server, model=names[0])


Again = Callable[[int, ChatFailure], bool]
"""Called after each failed try with the request's index; returns whether to send it once more (at its full cost)."""


Answers = Generator[tuple[int, ChatAnswer | ChatFailure], None, None]


def ask(server: ChatServer, requests: Iterable[ChatRequest], again: Again | None = None) -> Answers:
    """Send requests and yield their answers as they arrive.

    At most `server.concurrency` requests are read ahead of their answers, because one with an image may be megabytes.
    Closing the generator, or Ctrl-C, cancels the requests in flight. All requests are sent from one event loop, in the
    caller's thread where no loop is running there.

    Args:
        server: Receives the requests.
        requests: Any number of them.
        again: Called before each further try; None allows `server.retries` of them. If it returns False, the failure
            that is yielded has no cost: the cost of the try was already passed to `again`.

    Yields:
        The request's index and its answer or failure; each request once.

    Raises:
        UserError: At the first sign that no request can be answered: the server cannot be reached, refuses the key,
            or does not have the model.
    """
    answers = _answers(find_model(server), requests, again)
    # A notebook already runs a loop in this thread.
    yield from _in_thread(answers) if _is_in_loop() else answers


def _is_in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _answers(server: ChatServer, requests: Iterable[ChatRequest], again: Again | None) -> Answers:
    """Yield answers from a loop in this thread, which runs while an answer is awaited: handing over between threads
    would cost as much time as the request."""
    sender = _Sender(server)
    loop = asyncio.new_event_loop()
    waiting = enumerate(requests)
    in_flight: dict[asyncio.Task[ChatAnswer | ChatFailure], int] = {}
    done: deque[asyncio.Task[ChatAnswer | ChatFailure]] = deque()
    one_done = asyncio.Event()

    def keep(task: asyncio.Task[ChatAnswer | ChatFailure]) -> None:
        done.append(task)
        one_done.set()

    try:
        while True:
            for index, request in itertools.islice(waiting, server.concurrency - len(in_flight)):
                task = loop.create_task(sender.send(index, request, again))
                task.add_done_callback(keep)
                in_flight[task] = index
            if not in_flight:
                return
            if done:  # send the new requests before the next answer is handled
                loop.run_until_complete(_let_others_run())
            else:
                one_done.clear()
                loop.run_until_complete(one_done.wait())
            task = done.popleft()
            yield in_flight.pop(task), task.result()
    finally:
        for task in in_flight:
            task.remove_done_callback(keep)
            task.cancel()
        loop.run_until_complete(sender.close(in_flight))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _let_others_run() -> None:
    for _ in range(_STEPS_TO_SEND):
        await asyncio.sleep(0)


def _in_thread(answers: Answers) -> Answers:
    """Run a generator of answers in another thread."""
    with ThreadPoolExecutor(1, "chat") as thread:
        try:
            while (found := thread.submit(next, answers, None).result()) is not None:
                yield found
        finally:
            thread.submit(answers.close).result()


@dataclass(frozen=True)
class _FailedTry:
    """One try that failed.

    Attributes:
        reason: Shown to the user.
        wait: Seconds to wait at least before another try; None if another try is useless.
        usage: Tokens that it cost.
        is_down: Whether the server may be down.
    """

    reason: str
    wait: float | None = 0.0
    usage: Usage = (None, None)
    is_down: bool = False


class _Sender:
    """An asyncio client and what was learned about the server: whether it has answered, its name for `max_tokens`, and
    whether it accepts `response_format`."""

    def __init__(self, server: ChatServer) -> None:
        self.server = server
        self.client = openai.AsyncOpenAI(**_client_settings(server))
        self.answered = False
        self.max_tokens_name = "max_tokens"
        self.structured = True
        self.next_start = 0.0
        self.outage = Outage(server.url, server.reconnect, server.pause, self._responds)

    async def _responds(self) -> bool:
        """Check whether the server processes requests: any response but a gateway's or a loading server's."""
        try:
            await self.client.with_options(timeout=_PROBE_TIMEOUT).models.list()
        except openai.APIStatusError as error:
            return error.status_code not in DOWN
        except openai.APIConnectionError:
            return False
        except (openai.OpenAIError, ValueError, TypeError, AttributeError):
            return True  # it has no list of models
        return True

    async def close(self, cancelled: Iterable[asyncio.Task[Any]]) -> None:
        """Close the connections after the cancelled tasks have ended."""
        await asyncio.gather(*cancelled, return_exceptions=True)
        await self.client.close()

    async def send(self, index: int, request: ChatRequest, again: Again | None) -> ChatAnswer | ChatFailure:
        """Send a request until it is answered or no try is left.

        Args:
            index: The request's index, passed to `again`.
            request: Sent.
            again: As of `ask`.
        """
        attempt, waited_until = 0, math.inf
        while True:
            found = await self._try(request, attempt)
            if isinstance(found, ChatAnswer):
                self.answered = True
                return found
            failed = time.monotonic()
            waited_until = min(waited_until, failed + self.server.reconnect)
            may_wait = found.is_down and found.wait is not None and failed < waited_until
            was_down = may_wait and await self.outage.wait(failed)
            failure = ChatFailure(found.reason, *found.usage)
            if found.wait is None or (attempt >= self.server.retries and not was_down):
                return failure
            if not (was_down and found.usage == (0, 0)) and again is not None and not again(index, failure):
                return ChatFailure(f"{found.reason}, and the cap allows no further try", 0, 0)
            doubled = min(self.server.pause * 2**attempt, _LONGEST_PAUSE)
            await asyncio.sleep(max(found.wait, doubled * random.uniform(0.5, 1)))
            attempt += not was_down

    async def _try(self, request: ChatRequest, attempt: int) -> ChatAnswer | _FailedTry:
        max_tokens_name, structured = self.max_tokens_name, self.structured
        late = _FailedTry(f"no answer within {self.server.timeout:g} s")
        await self._wait_for_turn()
        try:
            async with asyncio.timeout(self.server.timeout):  # httpx restarts its timeout at every byte
                return await self._send_once(request)
        except (TimeoutError, openai.APITimeoutError):
            return late
        except openai.APIConnectionError as error:
            self._check_reached(error, attempt)
            cause = root_cause(error)
            never_sent = isinstance(cause, _UNREACHABLE)
            usage: Usage = (0, 0) if never_sent else (None, None)
            return _FailedTry(f"the connection broke ({type(cause).__name__})", usage=usage, is_down=self.answered)
        except openai.APIStatusError as error:
            await self._check_status(error)
            reason, usage = self._reason_of(error), usage_of_refusal(error)
            if max_tokens_name == "max_tokens" and "max_completion_tokens" in reason:  # OpenAI's newer models
                self.max_tokens_name = "max_completion_tokens"
                return _FailedTry(reason, usage=usage)
            if request.response_format is not None and structured and rejects_response_format(error, reason):
                self.structured = False
                return _FailedTry(reason, usage=usage)
            return _FailedTry(reason, retry_after(error), usage, error.status_code in DOWN)
        except NoAnswerError as error:
            return _FailedTry(str(error), usage=error.usage)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            return _FailedTry("malformed answer: no JSON")
        except UnicodeEncodeError:
            return _FailedTry("the request contains a lone surrogate, which UTF-8 cannot encode", None, (0, 0))
        except openai.OpenAIError as error:
            return _FailedTry(f"malformed answer: {type(error).__name__}")

    async def _wait_for_turn(self) -> None:
        spacing = 60 / self.server.requests_per_minute if self.server.requests_per_minute else _SPACING
        now = time.monotonic()
        start = max(self.next_start, now)
        self.next_start = start + spacing
        if start > now:
            await asyncio.sleep(start - now)

    async def _send_once(self, request: ChatRequest) -> ChatAnswer:
        settings = request.settings()
        settings[self.max_tokens_name] = settings.pop("max_tokens")
        if not self.structured:
            settings.pop("response_format", None)
        # `chat.completions.create` validates and copies everything sent and received, which takes longer than the rest.
        found: Any = await self.client.post(
            "/chat/completions",
            body={"model": self.server.model, "messages": request.messages, **settings, **self.server.fields},
            cast_to=object,
            options={"headers": {"Idempotency-Key": request.key}} if request.key else {},
        )
        text, usage = text_of(found), reported_usage(found)
        if self.server.refuse_empty and not text.strip():
            raise NoAnswerError("empty answer", usage)
        return ChatAnswer(
            text, usage[0] or 0, usage[1] or 0, str(found.get("model") or self.server.model), *reported_details(found)
        )

    def _check_reached(self, error: openai.APIConnectionError, attempt: int) -> None:
        """Stop if nothing listens at the URL: at once before the first answer, and after all tries where a server that
        is being restarted is not waited for."""
        is_last = attempt >= self.server.retries and not self.server.reconnect
        if isinstance(root_cause(error), _UNREACHABLE) and (not self.answered or is_last):
            raise _not_reached(self.server, error)

    async def _check_status(self, error: openai.APIStatusError) -> None:
        """Stop if every request will be refused."""
        status = error.status_code
        if status == 401 or (status == 403 and not self.answered):
            raise _refusal(self.server, status)
        if status == 404:
            try:
                known = "it has: " + _listed([model.id async for model in self.client.models.list()])
            except (openai.OpenAIError, ValueError, TypeError, AttributeError):
                known = "fix its name or the URL"
            raise UserError(f"{self.server.url} does not know the model {self.server.model!r} (HTTP 404); {known}")

    def _reason_of(self, error: openai.APIStatusError) -> str:
        """Describe a refusal in one line, without the key, which a server may repeat in its message."""
        body = error.body
        message = body.get("message") if isinstance(body, dict) else None
        text = " ".join(_without_key(str(message or error.response.text), self.server).split())
        return f"HTTP {error.status_code}" + (f": {text[:200]}" if text else "")


def _client_settings(server: ChatServer) -> dict[str, Any]:
    # No retries by the library: every try is counted and paid for here.
    return {"base_url": server.url, "api_key": server.key, "timeout": server.timeout, "max_retries": 0}


def _refusal(server: ChatServer, status: int) -> UserError:
    if status in (401, 403):
        return UserError(f"{server.url} refuses the key (HTTP {status}); set OPENAI_API_KEY to a valid one")
    if status in DOWN:
        return UserError(f"{server.url} is not ready (HTTP {status}); wait until its model is loaded, or see its log")
    return UserError(f"{server.url} does not list its models (HTTP {status}); name the model, or fix the URL")


def _not_reached(server: ChatServer, error: openai.APIConnectionError) -> UserError:
    if isinstance(error, openai.APITimeoutError):
        return UserError(f"{server.url}: no answer within {server.timeout:g} s; see its log, or raise the timeout")
    cause = _without_key(str(root_cause(error)), server)
    return UserError(f"{server.url} cannot be reached ({cause}); start the server, or fix the URL")


def _without_key(text: str, server: ChatServer) -> str:
    return text if server.key == NO_KEY else text.replace(server.key, "***")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
