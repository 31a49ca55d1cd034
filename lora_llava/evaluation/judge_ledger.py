"""What a judge has answered, kept as it comes, and what it may cost."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from lora_llava.errors import UserError
from lora_llava.inference.chat_request import ChatAnswer, ChatRequest

_CHARACTERS_PER_TOKEN = 4
"""OpenAI's rule of thumb for English text: an estimate, not a count."""


def request_key(model: str, request: ChatRequest, attempt: int) -> str:
    """What an answer is kept under.

    Args:
        model: The judge's name.
        request: Messages and settings.
        attempt: Which try at a text with scores in it this is.

    Returns:
        SHA-256, in hex, of all that the answer depends on.
    """
    content = json.dumps([model, request.messages, request.settings(), attempt], sort_keys=True)
    return hashlib.sha256(content.encode("ascii")).hexdigest()


class JudgeLedger:
    """A JSONL file of answers that is only appended to.

    An answer is on disk (fsync) before the next one is looked at, and what is there is never asked for again. What was
    on its way when the process was killed is asked for once more: nobody here can know whether the server had answered
    it. A last line that was cut off is taken away.

    Args:
        file: Made with its folder where it is not there; `FILE.lock` beside it keeps a second run out.

    Raises:
        UserError: Where another run is at work in it, or a line within it is no answer.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.answers: dict[str, ChatAnswer] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(file.with_name(file.name + ".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{file}: another run is judging into it; wait for it, or name another --output") from None
        try:
            self._stream: BinaryIO = file.open("ab+")
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        self._stream.seek(0)
        whole = 0
        for number, line in enumerate(self._stream, start=1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                row = json.loads(line)
                self.answers[row["key"]] = ChatAnswer(
                    row["text"], int(row["prompt_tokens"]), int(row["completion_tokens"]), row["model"]
                )
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.file}, line {number}: not a judge's answer; take the line out") from None
        self._stream.truncate(whole)

    def add(self, key: str, answer: ChatAnswer, **about: Any) -> None:
        """Keep an answer, on disk before this returns.

        Args:
            key: From `request_key`.
            answer: What came.
            about: For a person who reads the file.
        """
        counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        row = {"key": key, **about, "model": answer.model, **counts, "text": answer.text}
        self._stream.write(json.dumps(row).encode("ascii") + b"\n")
        self.answers[key] = answer  # before the slow part: Ctrl-C there loses nothing, as closing writes what is left
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Leave the file to the next run."""
        if hasattr(self, "_stream"):
            self._stream.close()
        self._lock.release()

    def __enter__(self) -> JudgeLedger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def estimate_tokens(request: ChatRequest) -> int:
    """About how many tokens a request's messages have: a token for four characters."""
    characters = sum(len(str(message["content"])) for message in request.messages)
    return math.ceil(characters / _CHARACTERS_PER_TOKEN)


@dataclass
class Budget:
    """What a run may ask, and what it has asked.

    Attributes:
        price_in: USD for a million tokens to the judge; None where unknown.
        price_out: The same of tokens from it.
        max_cost: USD that this run may spend.
        max_requests: Requests that this run may send; a try again after a failure is not counted.
        requests: Sent so far.
        spent: USD for the answers so far, by the server's count of tokens, or the estimate where it gives none.
        exhausted: Whether a request was refused while none was on its way: no other will be sent.

    Raises:
        UserError: For a cap on cost without prices, or a value that cannot be.
    """

    price_in: float | None = None
    price_out: float | None = None
    max_cost: float | None = None
    max_requests: int | None = None
    requests: int = 0
    spent: float = 0.0
    exhausted: bool = False
    _reserved: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("price_in", "price_out", "max_cost"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} is {value}; give 0 or more USD")
        if (self.price_in is None) != (self.price_out is None):
            raise UserError("--price-in and --price-out go together: USD for a million tokens, each way")
        if self.max_cost is not None and self.price_in is None:
            raise UserError("--max-cost needs the judge's prices; give --price-in and --price-out")

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """USD; 0 where the prices are unknown."""
        return (tokens_in * (self.price_in or 0.0) + tokens_out * (self.price_out or 0.0)) / 1e6

    def most(self, request: ChatRequest) -> float:
        """USD that a request costs at most: all the tokens it allows, its own by the estimate."""
        return self.cost(estimate_tokens(request), request.max_tokens)

    def take(self, key: str, request: ChatRequest) -> bool:
        """Set aside what a request costs at most.

        Returns:
            Whether it may be sent; where not, nothing is set aside.
        """
        most = self.most(request)
        many = self.max_requests is not None and self.requests >= self.max_requests
        dear = self.max_cost is not None and self.spent + sum(self._reserved.values()) + most > self.max_cost
        if many or dear:
            self.exhausted = many or not self._reserved
            return False
        self.requests += 1
        self._reserved[key] = most
        return True

    def settle(self, key: str, request: ChatRequest, answer: ChatAnswer | None) -> None:
        """Put what an answer did cost in the place of what was set aside; a failure is taken to cost nothing."""
        del self._reserved[key]
        if answer is not None:
            tokens_in = answer.prompt_tokens or estimate_tokens(request)
            tokens_out = answer.completion_tokens or math.ceil(len(answer.text) / _CHARACTERS_PER_TOKEN)
            self.spent += self.cost(tokens_in, tokens_out)
