"""Ledger of a judge's answers on disk."""

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
    """Return the key of an answer in the ledger.

    Args:
        model: Name of the judge.
        request: Messages and settings.
        attempt: Number of the attempt at a text with readable scores, from 0.

    Returns:
        SHA-256 in hex of all that the answer depends on.
    """
    content = json.dumps([model, request.messages, request.settings(), attempt], sort_keys=True)
    return hashlib.sha256(content.encode("ascii")).hexdigest()


class JudgeLedger:
    """An append-only JSONL file of answers.

    An answer is on disk (fsync) before the next one is processed, and is never requested again. Requests in flight when
    the process was killed are sent again, as the server may not have answered them. A last line that was cut short is
    removed.

    Args:
        file: The file, created with its folder if missing; `FILE.lock` beside it keeps out a second run.

    Raises:
        UserError: If another run has the file open, or a line is not an answer.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.answers: dict[str, ChatAnswer] = {}
        self.spent_under_caps = 0.0
        """USD spent by earlier runs with a cost cap, failed attempts included."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(file.with_name(file.name + ".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{file}: another run is writing to it; wait for it, or choose another --output") from None
        try:
            self._stream: BinaryIO = file.open("ab+")
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        self._stream.seek(0)
        complete = 0
        for number, line in enumerate(self._stream, start=1):
            if not line.endswith(b"\n"):
                break
            complete += len(line)
            try:
                row = json.loads(line)
                self.spent_under_caps += float(row.get("usd") or 0) * bool(row.get("capped"))
                if "failed" in row:
                    continue
                self.answers[row["key"]] = ChatAnswer(
                    row["text"], int(row["prompt_tokens"]), int(row["completion_tokens"]), row["model"]
                )
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{self.file}, line {number}: not a judge's answer; remove the line") from None
        self._stream.truncate(complete)

    def add_failure(self, key: str, reason: str, charge: Charge) -> None:
        """Append the cost of a failed attempt under a cap; it is on disk before this returns.

        Args:
            key: From `request_key`.
            reason: Why it failed.
            charge: From `Budget.settle`.
        """
        counts = {"prompt_tokens": charge.prompt_tokens, "completion_tokens": charge.completion_tokens}
        self._write({"key": key, "failed": reason, **counts, "usd": charge.usd, "capped": True})
        self._sync()

    def add(self, key: str, answer: ChatAnswer, **about: Any) -> None:
        """Append an answer; it is on disk before this returns.

        Args:
            key: From `request_key`.
            answer: The answer of the judge.
            about: Further values for human readers of the file.
        """
        counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        row = {"key": key, **about, "model": answer.model, **counts, "text": answer.text}
        self._write(row)
        self.answers[key] = answer  # before the sync, so that Ctrl-C during it loses nothing: closing flushes the line
        self._sync()

    def _write(self, row: dict[str, Any]) -> None:
        self._stream.write(json.dumps(row).encode("ascii") + b"\n")

    def _sync(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file and release its lock."""
        if hasattr(self, "_stream"):
            self._stream.close()
        self._lock.release()

    def __enter__(self) -> JudgeLedger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
