"""Requests to any OpenAI-compatible chat server (vLLM, SGLang, Ollama, OpenAI), several at once."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import openai

from lora_llava.core.errors import UserError
from lora_llava.inference.chat_errors import (
    NoAnswerError,
    Usage,
    knows_no_format,
    refused_usage,
    retry_after,
    root_cause,
    text_of,
    told_usage,
)
from lora_llava.inference.chat_request import ChatAnswer, ChatFailure, ChatRequest, image_part

__all__ = ["Again", "ChatAnswer", "ChatFailure", "ChatRequest", "ChatServer", "ask", "find_model", "image_part"]

_LONGEST_PAUSE = 30.0
_DAY = 86_400
_STEPS_TO_SEND = 5
"""Turns of the loop after which a request has reached its socket (measured with openai 3 and httpx)."""
_SPACING = 0.001
"""Seconds between two requests' starts, which take about as long to send: those that start together are answered
together, and then wait for one another, again and again (at 32 at once and 50 ms a request: 72% of the ideal speed,
and 94% with this)."""
_NOBODY = (ConnectionRefusedError, socket.gaierror)
_NO_KEY = "no-key"
"""Sent to servers that need none: the library insists on one."""


@dataclass(frozen=True)
class ChatServer:
    """Where to ask, and how patiently.

    Attributes:
        url: Of the API, such as `http://localhost:8000/v1`; one without a path gets `/v1`.
        model: Its name there; None for the only one that the server has.
        api_key: Default: the environment's OPENAI_API_KEY; a server that needs none gets a dummy. Never shown.
        concurrency: Requests at once.
        timeout: Seconds in which an answer has to be complete.
        retries: Further tries after a failure that may pass.
        refuse_empty: Whether an empty answer is a failure.
        requests_per_minute: Most requests in a minute, evenly spread; None sends each as soon as there is room.
        pause: Seconds before the first further try, doubled each time, up to 30.

    Raises:
        UserError: For a value that cannot be.
    """

    url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 4
    refuse_empty: bool = False
    requests_per_minute: int | None = None
    pause: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _api_url(self.url))
        if self.concurrency < 1:
            raise UserError(f"concurrency is {self.concurrency}; give 1 or more")
        if not 0 < self.timeout <= _DAY:
            raise UserError(f"timeout is {self.timeout:g}; give a number of seconds above 0, at most a day's {_DAY:,}")
        if self.requests_per_minute is not None and self.requests_per_minute < 1:
            raise UserError(f"requests_per_minute is {self.requests_per_minute}; give 1 or more")
        if self.retries < 0:
            raise UserError(f"retries is {self.retries}; give 0 or more")
        if not self.key.isascii() or not self.key.isprintable():
            raise UserError("the API key has characters that no key has; set OPENAI_API_KEY again")

    @property
    def key(self) -> str:
        """The key that is sent."""
        return (self.api_key or os.environ.get("OPENAI_API_KEY") or "").strip() or _NO_KEY


def _api_url(url: str) -> str:
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"the server's URL is {url!r}; give one such as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query:
        raise UserError("the server's URL holds a password or a query; give it bare, and a key in OPENAI_API_KEY")
    path = parts.path.rstrip("/") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path.removesuffix('/chat/completions')}"


def find_model(server: ChatServer) -> ChatServer:
    """Name the model of a server that has only one.

    Args:
        server: Returned as it is where its model is named.

    Returns:
        The server with its model named.

    Raises:
        UserError: For a server that cannot be reached, refuses the key, or has none or several models.
    """
    if server.model is not None:
        return server
    try:
        with openai.OpenAI(**_client_settings(server)) as client:
            names = [model.id for model in client.models.list()]
    except openai.APIStatusError as error:
        raise _refusal(server, error.status_code, "tell its models; name the model") from None
    except openai.APIConnectionError as error:
        raise _unreachable(server, error) from None
    except (openai.OpenAIError, ValueError, TypeError, AttributeError):
        raise UserError(f"{server.url} does not tell its models; name the model, or mend the URL") from None
    if len(names) != 1:
        found = f"{len(names)} models; name one: {_listed(names)}" if names else "no model; load one there"
        raise UserError(f"{server.url} has {found}")
    return replace(server, model=names[0])


Again = Callable[[int, ChatFailure], bool]
"""Asked after each failed try whether the request at this place may be tried once more, which costs once more."""


Answers = Generator[tuple[int, ChatAnswer | ChatFailure], None, None]


def ask(server: ChatServer, requests: Iterable[ChatRequest], again: Again | None = None) -> Answers:
    """Ask, and give the answers as they come.

    Requests are drawn one by one, no more than `server.concurrency` before their answers are given: one with an image
    may be megabytes. Closing the generator, or Ctrl-C, cancels what is on its way.

    Args:
        server: Whom.
        requests: What, in any number.
        again: Asked before each further try; None allows `server.retries` of them. Where it says no, the failure that
            is given has cost nothing: what the try cost, `again` was given.

    Yields:
        The request's place and its answer or failure; each request once.

    Raises:
        UserError: At the first sign that no request will be answered: the server cannot be reached, refuses the key,
            or does not have the model.
    """
    answers = _ask_here(find_model(server), requests, again)
    # A notebook's own loop is at work in this thread.
    yield from _in_thread(answers) if _is_in_loop() else answers


def _is_in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _ask_here(server: ChatServer, requests: Iterable[ChatRequest], again: Again | None) -> Answers:
    """Ask in a loop of this thread, which runs while an answer is waited for: no hand-over between threads, which would
    cost as much as the request."""
    asker = Asker(server)
    loop = asyncio.new_event_loop()
    waiting = enumerate(requests)
    alive: dict[asyncio.Task[ChatAnswer | ChatFailure], int] = {}
    done: deque[asyncio.Task[ChatAnswer | ChatFailure]] = deque()

    one_arrived = asyncio.Event()

    async def answer(index: int, request: ChatRequest) -> ChatAnswer | ChatFailure:
        async def may(failure: ChatFailure) -> bool:
            return again is None or again(index, failure)

        return await asker.answer(request, may)

    def arrived(task: asyncio.Task[ChatAnswer | ChatFailure]) -> None:
        done.append(task)
        one_arrived.set()

    try:
        while True:
            for index, request in itertools.islice(waiting, server.concurrency - len(alive)):
                task = loop.create_task(answer(index, request))
                task.add_done_callback(arrived)
                alive[task] = index
            if not alive:
                return
            if done:  # what was just drawn goes out before the next answer is looked at
                loop.run_until_complete(_let_others_run())
            else:
                one_arrived.clear()
                loop.run_until_complete(one_arrived.wait())
            task = done.popleft()
            yield alive.pop(task), task.result()
    finally:
        for task in alive:
            task.remove_done_callback(arrived)
            task.cancel()
        loop.run_until_complete(asker.close(alive))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _let_others_run() -> None:
    for _ in range(_STEPS_TO_SEND):
        await asyncio.sleep(0)


def _in_thread(answers: Answers) -> Answers:
    """The same answers, made in another thread."""
    with ThreadPoolExecutor(1, "chat") as thread:
        try:
            while (found := thread.submit(next, answers, None).result()) is not None:
                yield found
        finally:
            thread.submit(answers.close).result()


@dataclass(frozen=True)
class _Miss:
    """A try that failed.

    Attributes:
        reason: For a person.
        wait: Seconds to wait at least before another try; None where another is of no use.
        usage: Tokens that it cost.
    """

    reason: str
    wait: float | None = 0.0
    usage: Usage = (None, None)


class Asker:
    """Asks for one answer at a time: a client, and what was learned of the server: whether it answers, what it calls
    `max_tokens`, and whether it knows `response_format`."""

    def __init__(self, server: ChatServer) -> None:
        self.server = server
        # aiohttp takes two thirds of the time that httpx's own transport takes.
        self.client = openai.AsyncOpenAI(**_client_settings(server), http_client=openai.DefaultAioHttpClient())
        self.answered = False
        self.longest = "max_tokens"
        self.structured = True
        self.due = 0.0

    async def close(self, cancelled: Iterable[asyncio.Task[Any]]) -> None:
        """Close the connections, once what used them has ended."""
        await asyncio.gather(*cancelled, return_exceptions=True)
        await self.client.close()

    async def answer(
        self, request: ChatRequest, may: Callable[[ChatFailure], Awaitable[bool]]
    ) -> ChatAnswer | ChatFailure:
        """Ask until there is an answer or no try is left.

        Args:
            request: What.
            may: Given each failed try, and says whether another may follow.
        """
        attempt = 0
        while True:
            found = await self._try(request, attempt)
            if isinstance(found, ChatAnswer):
                self.answered = True
                return found
            failure = ChatFailure(found.reason, *found.usage)
            if found.wait is None or attempt == self.server.retries:
                return failure
            if not await may(failure):
                return ChatFailure(f"{found.reason}, and the cap allows no further try", 0, 0)
            doubled = min(self.server.pause * 2**attempt, _LONGEST_PAUSE)
            await asyncio.sleep(max(found.wait, doubled * random.uniform(0.5, 1)))
            attempt += 1

    async def _try(self, request: ChatRequest, attempt: int) -> ChatAnswer | _Miss:
        longest, structured = self.longest, self.structured
        await self._wait_for_turn()
        try:
            async with asyncio.timeout(self.server.timeout):  # httpx's own starts anew with every byte
                return await self._once(request)
        except TimeoutError:
            return _Miss(f"no answer within {self.server.timeout:g} s")
        except openai.APIConnectionError as error:  # aiohttp's broken connections come as timeouts too
            if isinstance(root_cause(error), TimeoutError):
                return _Miss(f"no answer within {self.server.timeout:g} s")
            self._check_reached(error, attempt)
            refused = isinstance(root_cause(error), _NOBODY)
            told = f"the connection broke ({type(root_cause(error)).__name__})"
            return _Miss(told, usage=(0, 0) if refused else (None, None))
        except openai.APIStatusError as error:
            await self._check_status(error)
            reason, usage = self._told(error), refused_usage(error)
            if longest == "max_tokens" and "max_completion_tokens" in reason:  # OpenAI's newer models
                self.longest = "max_completion_tokens"
                return _Miss(reason, usage=usage)
            if request.response_format is not None and structured and knows_no_format(error, reason):
                self.structured = False
                return _Miss(reason, usage=usage)
            return _Miss(reason, retry_after(error), usage)
        except NoAnswerError as error:
            return _Miss(str(error), usage=error.usage)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            return _Miss("malformed answer: no JSON")
        except UnicodeEncodeError:
            return _Miss("the request holds half a surrogate pair, which UTF-8 cannot hold", None, (0, 0))
        except openai.OpenAIError as error:
            return _Miss(f"malformed answer: {type(error).__name__}")

    async def _wait_for_turn(self) -> None:
        spacing = 60 / self.server.requests_per_minute if self.server.requests_per_minute else _SPACING
        now = time.monotonic()
        due, self.due = max(self.due, now), max(self.due, now) + spacing
        if due > now:
            await asyncio.sleep(due - now)

    async def _once(self, request: ChatRequest) -> ChatAnswer:
        settings = request.settings()
        settings[self.longest] = settings.pop("max_tokens")
        if not self.structured:
            settings.pop("response_format", None)
        # The library's own `create` checks and copies all that goes out and comes in, which takes longer than all else.
        found: Any = await self.client.post(
            "/chat/completions", body={"model": self.server.model, "messages": request.messages, **settings},
            cast_to=object, options={"headers": {"Idempotency-Key": request.key}} if request.key else {},
        )  # fmt: skip
        text, usage = text_of(found), told_usage(found)
        if self.server.refuse_empty and not text.strip():
            raise NoAnswerError("empty answer", usage)
        return ChatAnswer(text, usage[0] or 0, usage[1] or 0, str(found.get("model") or self.server.model))

    def _check_reached(self, error: openai.APIConnectionError, attempt: int) -> None:
        """End where nobody listens: at once where nobody has answered yet, else after all tries, as a server that is
        started again may be back."""
        if isinstance(root_cause(error), _NOBODY) and (not self.answered or attempt == self.server.retries):
            raise _unreachable(self.server, error)

    async def _check_status(self, error: openai.APIStatusError) -> None:
        """End where every request will be refused."""
        status = error.status_code
        if status == 401 or (status == 403 and not self.answered):
            raise _refusal(self.server, status, "")
        if status == 404:
            try:
                known = "it has: " + _listed([model.id async for model in self.client.models.list()])
            except (openai.OpenAIError, ValueError, TypeError, AttributeError):
                known = "mend its name or the URL"
            raise UserError(f"{self.server.url} does not know the model {self.server.model!r} (HTTP 404); {known}")

    def _told(self, error: openai.APIStatusError) -> str:
        """A refusal in a line; a server may repeat the key in it."""
        body = error.body
        message = body.get("message") if isinstance(body, dict) else None
        text = " ".join(_without_key(str(message or error.response.text), self.server).split())
        return f"HTTP {error.status_code}" + (f": {text[:200]}" if text else "")


def _client_settings(server: ChatServer) -> dict[str, Any]:
    return {"base_url": server.url, "api_key": server.key, "timeout": server.timeout, "max_retries": 0}


def _refusal(server: ChatServer, status: int, what: str) -> UserError:
    if status in (401, 403):
        return UserError(f"{server.url} refuses the key (HTTP {status}); set OPENAI_API_KEY to one that it takes")
    return UserError(f"{server.url} does not {what}, or mend the URL (HTTP {status})")


def _unreachable(server: ChatServer, error: openai.APIConnectionError) -> UserError:
    cause = _without_key(str(root_cause(error)), server)
    return UserError(f"{server.url} cannot be reached ({cause}); start the server, or mend the URL")


def _without_key(text: str, server: ChatServer) -> str:
    return text if server.key == _NO_KEY else text.replace(server.key, "***")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
