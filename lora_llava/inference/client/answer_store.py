"""Store every request's answer and cost in an append-only SQLite file, so that a stopped run resumes where it was."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from lora_llava.core.errors import UserError
from lora_llava.inference.client.budget import Charge
from lora_llava.inference.client.chat_request import ChatAnswer, ChatRequest

ANSWERED = ""
"""The reason that is stored with the cost of an answer."""
_FORMAT = 1
_SYNC_SECONDS = 5.0
_TABLES = """
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


def answer_key(*parts: Any) -> str:
    """Return the key under which an answer is stored.

    Args:
        parts: All that the answer depends on, as plain JSON.

    Returns:
        SHA-256 in hex.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii")).hexdigest()


def request_key(model: str, request: ChatRequest, *parts: str | int) -> str:
    """Return the key under which the answer to a request is stored.

    Args:
        model: The model's name.
        request: Messages and settings.
        parts: What else distinguishes the request, such as the id of its task and the number of the attempt.
    """
    return answer_key(model, request.messages, request.settings(), *parts)


class AnswerStore:
    """An append-only SQLite file of answers, locked while it is open.

    An answer is in the file before the next one is handled, so a killed process loses none, and no stored answer is
    requested again. With `sync`, each answer also survives a power failure; without, the file is synced every five
    seconds (SQLite's WAL with `synchronous=NORMAL`, sqlite.org/pragma.html), because waiting for the disk at every
    answer would delay the other requests.

    Args:
        file: Created with its folder if missing.
        sync: Whether every answer is synced to disk.

    Raises:
        UserError: If another run uses the file, it is not an answer store, or it cannot be written.
    """

    def __init__(self, file: Path, *, sync: bool = False) -> None:
        self.file = file
        self._sync = sync
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(file.with_name(file.name + ".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{file}: another run is using it; wait for that run, or name another folder") from None
        try:
            with self._readable_errors():
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._base = sqlite3.connect(self.file, isolation_level=None)
        self._base.execute("PRAGMA journal_mode=WAL")
        self._base.execute(f"PRAGMA synchronous={'FULL' if self._sync else 'NORMAL'}")
        (found,) = self._base.execute("PRAGMA user_version").fetchone()
        if found not in (0, _FORMAT):
            raise UserError(f"{self.file} was written by a newer version; name another folder, or update lora_llava")
        self._base.executescript(_TABLES)
        self._synced = time.monotonic()
        self._base.execute(f"PRAGMA user_version={_FORMAT}")

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        """Turn SQLite's errors into messages for the user."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            text = str(error)
            if "full" in text or "I/O" in text:
                fix = "free some space and run the same command again: it resumes from here"
                raise UserError(f"{self.file} cannot be written ({text}); {fix}") from None
            if "not a database" in text or "malformed" in text:
                fix = "move it away, or restore it from a copy"
                raise UserError(f"{self.file} is damaged or not an answer store ({text}); {fix}") from None
            raise UserError(f"{self.file} cannot be used ({text})") from None

    def get(self, key: str) -> ChatAnswer | None:
        """Return the answer stored under a key, if any."""
        columns = "text, prompt_tokens, completion_tokens, model"
        with self._readable_errors():
            row = self._base.execute(f"SELECT {columns} FROM answers WHERE key = ?", (key,)).fetchone()
        return ChatAnswer(*row) if row else None

    def count(self) -> int:
        """Return the number of stored answers."""
        with self._readable_errors():
            (count,) = self._base.execute("SELECT COUNT(*) FROM answers").fetchone()
        return int(count)

    def is_empty(self) -> bool:
        """Check whether no answer and no cost is stored."""
        query = "SELECT EXISTS (SELECT 1 FROM answers) OR EXISTS (SELECT 1 FROM charges)"
        with self._readable_errors():
            (found,) = self._base.execute(query).fetchone()
        return not found

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
            key: From `request_key`.
            task_id: The task or question that it answers.
            attempt: The number of the attempt, from 0.
            prompt_hash: SHA-256 of the prompt; empty if unknown.
            answer: Stored with its text in valid UTF-8 (`?` replaces a lone surrogate).
            usd: Its cost; None if prices are unknown.
            verdict: `accepted`, or the reason of the rejection; empty where answers are not checked.
            detail: Of the rejection.

        Raises:
            UserError: If the disk is full or the file cannot be written.
        """
        text = answer.text.encode("utf-8", "replace").decode("utf-8")
        counts = (answer.prompt_tokens, answer.completion_tokens)
        row = (key, task_id, attempt, prompt_hash, answer.model, text, *counts, usd, verdict, detail, time.time())
        with self._readable_errors():
            self._base.execute(f"INSERT INTO answers VALUES ({', '.join('?' * len(row))})", row)
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._base.execute("PRAGMA wal_checkpoint(PASSIVE)")
                self._synced = time.monotonic()

    def add_failure(self, key: str, task_id: str, attempt: int, reason: str) -> None:
        """Record that a request was not answered; the next run sends it again."""
        with self._readable_errors():
            self._base.execute(
                "INSERT INTO failures VALUES (?, ?, ?, ?, ?)", (key, task_id, attempt, reason, time.time())
            )

    def add_charge(self, key: str, reason: str, charge: Charge, capped: bool) -> None:
        """Record the cost of one try.

        Args:
            key: The request's key.
            reason: Why the try failed; `ANSWERED` if it did not.
            charge: From `Budget.settle`.
            capped: Whether the run has a cap on cost.
        """
        row = (key, reason, charge.prompt_tokens, charge.completion_tokens, charge.usd, capped, time.time())
        with self._readable_errors():
            self._base.execute("INSERT INTO charges VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Store all that is added within the block, or nothing if it fails."""
        with self._readable_errors():
            self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._base.execute("ROLLBACK")
            raise
        with self._readable_errors():
            self._base.execute("COMMIT")

    def spent_under_caps(self) -> float:
        """Return the USD that runs with a cap on cost have spent, failed tries included."""
        with self._readable_errors():
            (usd,) = self._base.execute("SELECT SUM(usd) FROM charges WHERE capped").fetchone()
        return usd or 0.0

    def totals(self) -> dict[str, Any]:
        """Return the answers, tokens and USD of all runs, failed tries included; USD is None if a price is unknown."""
        sums = (
            "SELECT COUNT(*) AS n, SUM(prompt_tokens) AS p, SUM(completion_tokens) AS c, SUM(usd) AS u, COUNT(usd) AS k"
        )
        query = (
            f"SELECT SUM(n), SUM(p), SUM(c), SUM(u), SUM(k) FROM ({sums} FROM answers UNION ALL "
            f"{sums} FROM charges WHERE reason <> '{ANSWERED}')"
        )
        with self._readable_errors():
            entries, prompt, completion, usd, priced = self._base.execute(query).fetchone()
            (failed,) = self._base.execute("SELECT COUNT(*) FROM failures").fetchone()
        return {
            "answers": self.count(),
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

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
