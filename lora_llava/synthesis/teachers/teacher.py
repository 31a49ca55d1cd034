"""Who writes the samples, whatever it is."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

from lora_llava.inference.chat_request import ChatAnswer, ChatFailure, ChatRequest
from lora_llava.inference.client import Again, ChatServer, ask
from lora_llava.synthesis.contexts.context import Context
from lora_llava.synthesis.sample import Task


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        task: What is to be made.
        context: Of what.
        request: What the teacher is sent.
        key: What the ledger keeps its answer under.
        attempt: Which try at a sample that passes this is, from 0.
    """

    task: Task
    context: Context
    request: ChatRequest
    key: str
    attempt: int


Answers = Generator[tuple[int, ChatAnswer | ChatFailure], None, None]
Teacher = Callable[[Iterable[Asked], Again | None], Answers]
"""Answers requests in any order, each with its place; draws them as it needs them, and asks before each further try at
one (`server.Again`)."""


def by_server(server: ChatServer) -> Teacher:
    """A model on an OpenAI-compatible server.

    Args:
        server: With its model named.
    """

    def answer(asked: Iterable[Asked], again: Again | None = None) -> Answers:
        return ask(server, (each.request for each in asked), again)

    return answer
