"""The interface of teachers, and the teacher behind a server."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

from lora_llava.inference.client.chat_request import ChatAnswer, ChatFailure, ChatRequest
from lora_llava.inference.client.client import Again, ChatServer, ask
from lora_llava.synthesis.contexts.context import Context
from lora_llava.synthesis.sample import Task


@dataclass(frozen=True)
class TeacherRequest:
    """One request to a teacher.

    Attributes:
        task: Sample to generate.
        context: Context of its image.
        request: Messages and settings.
        key: Key of the answer in the ledger.
        attempt: Index of the attempt at this sample, from 0.
    """

    task: Task
    context: Context
    request: ChatRequest
    key: str
    attempt: int


Answers = Generator[tuple[int, ChatAnswer | ChatFailure], None, None]
Teacher = Callable[[Iterable[TeacherRequest], Again | None], Answers]
"""Function that answers requests in any order, each with its index. It reads the requests as it needs them, and calls
its second argument before it retries one."""


def by_server(server: ChatServer) -> Teacher:
    """Return a teacher that is a model on an OpenAI-compatible server.

    Args:
        server: The server, with the name of its model.
    """

    def answer(requests: Iterable[TeacherRequest], again: Again | None = None) -> Answers:
        return ask(server, (each.request for each in requests), again)

    return answer
