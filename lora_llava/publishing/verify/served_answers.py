"""A server's answers to questions, with the number and ids of their prompts' tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_llava.core.errors import UserError, nearest
from lora_llava.core.progress import progress_bar
from lora_llava.inference.client.chat_request import ChatAnswer, ChatFailure, ChatRequest
from lora_llava.inference.client.client import ChatServer, ask, find_model
from lora_llava.inference.served.server_facts import ServerFacts, read_facts, served_ids
from lora_llava.publishing.verify.asked_questions import AskedQuestion


@dataclass(frozen=True)
class ServedAnswer:
    """What a server made of one question.

    Attributes:
        found: Its answer or failure.
        ids: The ids of its prompt; None if the server does not report them.
    """

    found: ChatAnswer | ChatFailure
    ids: list[int] | None

    @property
    def text(self) -> str | None:
        """The answer; None for a failure."""
        return self.found.text.strip() if isinstance(self.found, ChatAnswer) else None


def named_server(server: ChatServer) -> tuple[ChatServer, ServerFacts]:
    """Name the model of a server and read what it reports about itself.

    Raises:
        UserError: If it cannot be reached, has no model, has several and none is named, or not the named one.
    """
    facts = read_facts(server)
    if server.model is None and len(facts.names) > 1:
        raise UserError(
            f"{server.url} serves {len(facts.names)} models: {', '.join(facts.names[:20])}; name one with "
            "--server-model"
        )
    if server.model is not None and facts.names and server.model not in facts.names and facts.kind != "llama.cpp":
        known = nearest(server.model, facts.names) or f"; it has: {', '.join(facts.names[:20])}"
        raise UserError(f"--server-model: {server.url} has no model {server.model!r}{known}")
    return find_model(server), facts


def ask_server(
    server: ChatServer, facts: ServerFacts, questions: Sequence[AskedQuestion], max_tokens: int
) -> list[ServedAnswer]:
    """Ask a server all questions greedily, with log-probabilities where it gives them.

    Args:
        server: The server, with its model named.
        facts: Of `named_server`.
        questions: The questions.
        max_tokens: Most tokens of an answer.

    Returns:
        What it made of each question.

    Raises:
        UserError: If it answers none of them.
    """
    sent = [question.to_send() for question in questions]
    asking = replace(server, fields={"return_token_ids": True, **server.fields}) if facts.kind == "vLLM" else server
    found: dict[int, ChatAnswer | ChatFailure] = {}
    with progress_bar(total=len(questions), desc="asking the server", unit="question", leave=False) as bar:
        for place, answer in ask(asking, [ChatRequest(m, max_tokens, logprobs=True) for m in sent]):
            found[place] = answer
            bar.update()
        refused = [place for place, answer in found.items() if _refuses_logprobs(answer)]
        for place, answer in ask(asking, [ChatRequest(sent[place], max_tokens) for place in refused]):
            found[refused[place]] = answer
    failures = [answer for answer in found.values() if isinstance(answer, ChatFailure)]
    if len(failures) == len(questions):
        late = (
            "raise --timeout, or see the server's log"
            if "no answer within" in failures[0].reason
            else ("see the server's log")
        )
        raise UserError(f"{server.url} answered none of {len(questions)} questions ({failures[0].reason}); {late}")
    return [ServedAnswer(found[place], served_ids(server, facts, messages)) for place, messages in enumerate(sent)]


def _refuses_logprobs(answer: ChatAnswer | ChatFailure) -> bool:
    return isinstance(answer, ChatFailure) and "logprobs" in answer.reason


def lacks_images(answers: Sequence[ServedAnswer], questions: Sequence[AskedQuestion]) -> bool:
    """Check whether a server refuses all questions with an image and answers all others."""
    refused = {place for place, answer in enumerate(answers) if answer.text is None}
    shown = {place for place, question in enumerate(questions) if question.images()}
    late = any("no answer within" in getattr(answers[place].found, "reason", "") for place in refused)
    return bool(shown) and refused == shown and not late
