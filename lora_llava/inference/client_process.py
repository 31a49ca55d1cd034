"""Requests sent by a process of their own: what is sent and what is done with the answers then share two cores."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable
from typing import IO, Any

from lora_llava.core.errors import UserError
from lora_llava.inference.chat_request import ChatAnswer, ChatFailure, ChatRequest
from lora_llava.inference.client import Again, Asker, ChatServer, find_model

_AHEAD = 16
"""Requests that wait beside the sender: where an answer comes, the next one leaves while the last is looked at."""
_SIZE = 8
"""Bytes of a message's length, before it."""
_PATIENCE = 5.0
"""Seconds for the sender to end once it is told."""


Came = tuple[int, ChatAnswer | ChatFailure, bool]
"""A request's place, what came of it, and whether that is all: where it is not, a try has failed, and the sender waits
for `(place, whether another may follow)`."""


def ask_apart(
    server: ChatServer, requests: Iterable[ChatRequest], again: Again | None = None
) -> Generator[tuple[int, ChatAnswer | ChatFailure], None, None]:
    """Ask as `server.ask` does, by another process, which takes a second to start.

    Up to 16 requests more than `server.concurrency` are drawn before their answers are given. The process ends with
    the generator, and with this process, however that ends.

    Args:
        server: Whom.
        requests: What, in any number.
        again: As of `server.ask`.

    Yields:
        The request's place and its answer or failure; each request once.

    Raises:
        UserError: As `server.ask`.
        RuntimeError: Where the other process was ended from outside.
    """
    server = find_model(server)
    waiting = enumerate(requests)
    on_way = 0
    came: deque[Came] = deque()
    with _started(server) as process:
        assert process.stdin is not None
        while True:
            while on_way < server.concurrency + _AHEAD and (drawn := next(waiting, None)) is not None:
                _send(process.stdin, drawn)
                on_way += 1
            if not on_way:
                return
            if not came:
                came.extend(_receive(process))
            index, found, ended = came.popleft()
            if not ended:
                assert isinstance(found, ChatFailure)
                _send(process.stdin, (index, again is None or again(index, found)))
                continue
            on_way -= 1
            yield index, found


@contextlib.contextmanager
def _started(server: ChatServer) -> Generator[subprocess.Popen[bytes], None, None]:
    # Not multiprocessing, which imports the caller's script once more.
    command = [sys.executable, "-m", "lora_llava.inference.client_process"]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # as this process finds modules
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=settings)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        _send(process.stdin, server)
        yield process
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()  # which tells it to end
        process.stdout.close()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _send(pipe: IO[bytes], content: Any) -> None:
    message = pickle.dumps(content)
    with contextlib.suppress(BrokenPipeError):  # why it ended is read where an answer is waited for
        pipe.write(len(message).to_bytes(_SIZE) + message)
        pipe.flush()


def _receive(process: subprocess.Popen[bytes]) -> list[Came]:
    assert process.stdout is not None
    found: list[Came] | UserError | None = _next(process.stdout)
    if found is None:
        raise RuntimeError(f"the process that asks the server ended by itself (exit status {process.wait()})")
    if isinstance(found, UserError):
        raise found
    return found


def _next(pipe: IO[bytes]) -> Any:
    """The next message; None where the other end is gone."""
    size = pipe.read(_SIZE)
    message = pipe.read(int.from_bytes(size)) if len(size) == _SIZE else b""
    return pickle.loads(message) if message and len(message) == int.from_bytes(size) else None


async def _serve(inlet: IO[bytes], outlet: IO[bytes]) -> None:
    """Answer what comes in until it closes.

    Raises:
        UserError: From the first request that shows that none will be answered.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, ChatRequest]] = asyncio.Queue()
    closed = loop.create_future()
    done: list[Came] = []
    permits: dict[int, asyncio.Future[bool]] = {}
    server: ChatServer = _next(inlet)
    asker = Asker(server)

    def take(drawn: tuple[int, ChatRequest | bool]) -> None:
        index, content = drawn
        if isinstance(content, bool):
            permits.pop(index).set_result(content)
        else:
            queue.put_nowait((index, content))

    def read() -> None:
        """In a thread, so that this process never stops reading: the other one may be writing while this one does."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended before its caller
            while (drawn := _next(inlet)) is not None:
                loop.call_soon_threadsafe(take, drawn)
            loop.call_soon_threadsafe(closed.set_result, None)

    def write() -> None:
        message = list(done)
        done.clear()
        _send(outlet, message)

    def tell(index: int, found: ChatAnswer | ChatFailure, ended: bool) -> None:
        if not done:  # all that came in this turn of the loop go together
            loop.call_soon(write)
        done.append((index, found, ended))

    async def work() -> None:
        while True:
            index, request = await queue.get()

            async def may(failure: ChatFailure, index: int = index) -> bool:
                permits[index] = loop.create_future()
                tell(index, failure, ended=False)
                return await permits[index]

            tell(index, await asker.answer(request, may), ended=True)

    threading.Thread(target=read, daemon=True).start()
    workers = [asyncio.create_task(work()) for _ in range(server.concurrency)]
    try:
        ended, _ = await asyncio.wait([closed, *workers], return_when=asyncio.FIRST_COMPLETED)
        for each in ended:
            each.result()
    finally:
        for worker in workers:
            worker.cancel()
        await asker.close(workers)


def _loop_factory() -> Any:
    """uvloop's where it is installed, which is where it exists; asyncio's own takes a fifth longer for a request."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return None
    return new_event_loop


def main() -> None:
    """The process itself, which Ctrl-C reaches too: it goes on until its caller closes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # what was imported stays: to look through it again and again holds up the requests
    outlet = sys.stdout.buffer
    sys.stdout = sys.stderr
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(sys.stdin.buffer, outlet))
    except UserError as error:
        _send(outlet, error)
    os._exit(0)  # a thread may still be reading, which Python's own way to end does not bear


if __name__ == "__main__":
    main()
