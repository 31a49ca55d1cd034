"""What a judge has answered, kept as it comes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from lora_llava.core.errors import UserError
from lora_llava.inference.budget import Charge
from lora_llava.inference.chat_request import ChatAnswer, ChatRequest


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
        self.spent_under_caps = 0.0
        """USD that earlier runs with a cap on cost spent, failed tries included."""
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
                self.spent_under_caps += float(row.get("usd") or 0) * bool(row.get("capped"))
                if "failed" in row:
                    continue
                self.answers[row["key"]] = ChatAnswer(
                    row["text"], int(row["prompt_tokens"]), int(row["completion_tokens"]), row["model"]
                )
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{self.file}, line {number}: not a judge's answer; take the line out") from None
        self._stream.truncate(whole)

    def add_failure(self, key: str, reason: str, charge: Charge) -> None:
        """Keep what a try without an answer cost under a cap, on disk before this returns.

        Args:
            key: From `request_key`.
            reason: Why it failed.
            charge: From `Budget.settle`.
        """
        counts = {"prompt_tokens": charge.prompt_tokens, "completion_tokens": charge.completion_tokens}
        self._write({"key": key, "failed": reason, **counts, "usd": charge.usd, "capped": True})
        self._sync()

    def add(self, key: str, answer: ChatAnswer, **about: Any) -> None:
        """Keep an answer, on disk before this returns.

        Args:
            key: From `request_key`.
            answer: What came.
            about: For a person who reads the file.
        """
        counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        row = {"key": key, **about, "model": answer.model, **counts, "text": answer.text}
        self._write(row)
        self.answers[key] = answer  # before the slow part: Ctrl-C there loses nothing, as closing writes what is left
        self._sync()

    def _write(self, row: dict[str, Any]) -> None:
        self._stream.write(json.dumps(row).encode("ascii") + b"\n")

    def _sync(self) -> None:
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
