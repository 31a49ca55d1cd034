"""Ledger of a data set: every answer, failure and charge in an append-only SQLite file."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from lora_llava.core.errors import UserError
from lora_llava.inference.budget import Charge
from lora_llava.inference.chat_request import ChatAnswer, ChatRequest

LEDGER_FILE = "ledger.sqlite"
ANSWERED = ""
"""Reason of a charge whose request was answered."""
_FORMAT = 1
_SYNC_SECONDS = 5.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, task_id TEXT NOT NULL, attempt INTEGER NOT NULL, prompt_hash TEXT NOT NULL,
    model TEXT NOT NULL, text TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    usd REAL, verdict TEXT NOT NULL, detail TEXT NOT NULL, at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS failures (
    key TEXT NOT NULL, task_id TEXT NOT NULL, attempt INTEGER NOT NULL, reason TEXT NOT NULL, at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS charges (
    key TEXT NOT NULL, reason TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    usd REAL, capped INTEGER NOT NULL, at REAL NOT NULL
);
CREATE TRIGGER IF NOT EXISTS charges_stay BEFORE UPDATE ON charges BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER IF NOT EXISTS charges_keep BEFORE DELETE ON charges BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER IF NOT EXISTS answers_stay BEFORE UPDATE ON answers BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER IF NOT EXISTS answers_keep BEFORE DELETE ON answers BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER IF NOT EXISTS failures_stay BEFORE UPDATE ON failures BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER IF NOT EXISTS failures_keep BEFORE DELETE ON failures BEGIN SELECT RAISE(ABORT, 'append only'); END;
"""


def request_key(model: str, request: ChatRequest, task_id: str, attempt: int) -> str:
    """Return the key of an answer.

    Args:
        model: The teacher's name.
        request: Messages and settings.
        task_id: Task of the request; the requests of two samples of one image may be equal otherwise.
        attempt: Index of the attempt at this sample, from 0.

    Returns:
        SHA-256, in hex, of everything that the answer depends on.
    """
    content = json.dumps([model, request.messages, request.settings(), task_id, attempt], sort_keys=True)
    return hashlib.sha256(content.encode("ascii")).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One stored answer.

    Attributes:
        text: The answer as the teacher wrote it.
        model: The model's name as reported by the server.
        prompt_hash: SHA-256 of the flavour's prompt.
    """

    text: str
    model: str
    prompt_hash: str


class Ledger:
    """The ledger file of a data set, locked while it is open.

    Each answer is written before the next one is handled, so that a killed process loses no answer and a resumed run
    requests none twice. To survive a power cut, the file is synced every five seconds; syncing at every answer would
    delay the others (SQLite's WAL with `synchronous=NORMAL`, sqlite.org/pragma.html).

    Args:
        file: Path of the file; it and its folder are created if missing.

    Raises:
        UserError: If another run uses the file, it is not a ledger, or it cannot be written.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(file.with_name(file.name + ".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{file}: another run uses it; wait for that run, or name another output_dir") from None
        try:
            with self._explain_errors():
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._base = sqlite3.connect(self.file, isolation_level=None)
        self._base.execute("PRAGMA journal_mode=WAL")
        self._base.execute("PRAGMA synchronous=NORMAL")
        (found,) = self._base.execute("PRAGMA user_version").fetchone()
        if found not in (0, _FORMAT):
            raise UserError(
                f"{self.file} was written by a newer version of lora_llava; upgrade, or name another output_dir"
            )
        self._base.executescript(_SCHEMA)
        self._synced = time.monotonic()
        self._base.execute(f"PRAGMA user_version={_FORMAT}")

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Turn errors of SQLite into errors for the user."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            message = str(error)
            if "full" in message or "I/O" in message:
                fix = "free disk space and run the same command to resume"
                raise UserError(f"{self.file} cannot be written ({message}); {fix}") from None
            if "not a database" in message or "malformed" in message:
                fix = "move it away, or restore it from a backup"
                raise UserError(f"{self.file} is damaged or is not a ledger ({message}); {fix}") from None
            raise UserError(f"{self.file} cannot be used ({message})") from None

    def get(self, key: str) -> Entry | None:
        """Return the answer with this key, or None."""
        with self._explain_errors():
            row = self._base.execute("SELECT text, model, prompt_hash FROM answers WHERE key = ?", (key,)).fetchone()
        return Entry(*row) if row else None

    def add(
        self,
        key: str,
        task_id: str,
        attempt: int,
        prompt_hash: str,
        answer: ChatAnswer,
        usd: float | None,
        verdict: str,
        detail: str,
    ) -> None:
        """Store an answer.

        Args:
            key: Key from `request_key`.
            task_id: Task of the request.
            attempt: Index of the attempt.
            prompt_hash: SHA-256 of the flavour's prompt.
            answer: The answer.
            usd: Cost in USD; None if prices are unknown.
            verdict: `accepted`, or the reason of the rejection.
            detail: Detail of the rejection, else empty.

        Raises:
            UserError: If the disk is full or the file cannot be written.
        """
        row = (
            key,
            task_id,
            attempt,
            prompt_hash,
            answer.model,
            answer.text,
            answer.prompt_tokens,
            answer.completion_tokens,
            usd,
            verdict,
            detail,
            time.time(),
        )
        with self._explain_errors():
            self._base.execute(f"INSERT INTO answers VALUES ({', '.join('?' * len(row))})", row)
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._base.execute("PRAGMA wal_checkpoint(PASSIVE)")
                self._synced = time.monotonic()

    def add_failure(self, key: str, task_id: str, attempt: int, reason: str) -> None:
        """Store that a request failed; the next run sends it again."""
        with self._explain_errors():
            self._base.execute(
                "INSERT INTO failures VALUES (?, ?, ?, ?, ?)", (key, task_id, attempt, reason, time.time())
            )

    def add_charge(self, key: str, reason: str, charge: Charge, capped: bool) -> None:
        """Store the cost of one try at a request.

        Args:
            key: Key of the request.
            reason: Why the try failed; `ANSWERED` if it did not.
            charge: Charge from `Budget.settle`.
            capped: Whether the run has a cap on cost.
        """
        row = (key, reason, charge.prompt_tokens, charge.completion_tokens, charge.usd, capped, time.time())
        with self._explain_errors():
            self._base.execute("INSERT INTO charges VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def spent_under_caps(self) -> float:
        """Return the USD spent by runs with a cap on cost, including failed tries."""
        with self._explain_errors():
            (usd,) = self._base.execute("SELECT SUM(usd) FROM charges WHERE capped").fetchone()
        return usd or 0.0

    def totals(self) -> dict[str, Any]:
        """Sum up all runs: answers, failed requests, and tokens and USD including failed tries.

        `usd` is None if any price was unknown.
        """
        sums = (
            "SELECT COUNT(*) AS n, SUM(prompt_tokens) AS p, SUM(completion_tokens) AS c, SUM(usd) AS u, COUNT(usd) AS k"
        )
        query = (
            f"SELECT SUM(n), SUM(p), SUM(c), SUM(u), SUM(k) FROM ({sums} FROM answers UNION ALL "
            f"{sums} FROM charges WHERE reason <> '{ANSWERED}')"
        )
        with self._explain_errors():
            entries, prompt, completion, usd, priced = self._base.execute(query).fetchone()
            (count,) = self._base.execute("SELECT COUNT(*) FROM answers").fetchone()
            (failed,) = self._base.execute("SELECT COUNT(*) FROM failures").fetchone()
        return {
            "answers": count,
            "prompt_tokens": prompt or 0,
            "completion_tokens": completion or 0,
            "usd": round(usd or 0.0, 4) if priced == entries and entries else None,
            "failed_requests": failed,
        }

    def close(self) -> None:
        """Close the file and release its lock."""
        if hasattr(self, "_base"):
            self._base.close()
        self._lock.release()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
