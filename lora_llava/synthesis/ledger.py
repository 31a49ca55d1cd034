"""Every request and answer of a set, in an SQLite file that is only appended to."""

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
"""In the place of a reason, of a charge for an answer."""
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
    """What an answer is kept under.

    Args:
        model: The teacher's name.
        request: Messages and settings.
        task_id: Whose; two samples of one image may be asked for in the same words.
        attempt: Which try at a sample that passes this is.

    Returns:
        SHA-256, in hex, of all that the answer depends on.
    """
    content = json.dumps([model, request.messages, request.settings(), task_id, attempt], sort_keys=True)
    return hashlib.sha256(content.encode("ascii")).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One answer.

    Attributes:
        text: As the teacher wrote it.
        model: As the server names it.
        prompt_hash: SHA-256 of the flavour's prompt.
    """

    text: str
    model: str
    prompt_hash: str


class Ledger:
    """The file of a set, locked while it is open.

    An answer is in the file before the next one is looked at: a process that is killed loses none that it had, and
    what is there is never asked for again. Against a power cut the file is synced every five seconds: to wait for the
    disk at every answer would hold up the others (SQLite's WAL with `synchronous=NORMAL`, sqlite.org/pragma.html).

    Args:
        file: Made with its folder where it is not there.

    Raises:
        UserError: Where another run is at work in it, it is no ledger, or it cannot be written.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(file.with_name(file.name + ".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{file}: another run is at work in it; wait for it, or name another output_dir") from None
        try:
            with self._told():
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
            raise UserError(f"{self.file} was written by a newer version; name another output_dir")
        self._base.executescript(_SCHEMA)
        self._synced = time.monotonic()
        self._base.execute(f"PRAGMA user_version={_FORMAT}")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What SQLite says, for a person."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            told = str(error)
            if "full" in told or "I/O" in told:
                mend = "make room and run the same command again: it goes on from here"
                raise UserError(f"{self.file} cannot be written ({told}); {mend}") from None
            if "not a database" in told or "malformed" in told:
                raise UserError(f"{self.file} is damaged or no ledger ({told}); move it away, or restore it") from None
            raise UserError(f"{self.file} cannot be used ({told})") from None

    def get(self, key: str) -> Entry | None:
        """The answer under a key, if there is one."""
        with self._told():
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
        """Keep an answer.

        Args:
            key: From `request_key`.
            task_id: Whose it is.
            attempt: Which try.
            prompt_hash: SHA-256 of the flavour's prompt.
            answer: What came.
            usd: What it cost; None where prices are unknown.
            verdict: `accepted`, or the reason of the rejection.
            detail: Of the rejection.

        Raises:
            UserError: Where the disk is full or the file cannot be written.
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
        with self._told():
            self._base.execute(f"INSERT INTO answers VALUES ({', '.join('?' * len(row))})", row)
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._base.execute("PRAGMA wal_checkpoint(PASSIVE)")
                self._synced = time.monotonic()

    def add_failure(self, key: str, task_id: str, attempt: int, reason: str) -> None:
        """Keep that a request was not answered; it is asked for again in the next run."""
        with self._told():
            self._base.execute(
                "INSERT INTO failures VALUES (?, ?, ?, ?, ?)", (key, task_id, attempt, reason, time.time())
            )

    def add_charge(self, key: str, reason: str, charge: Charge, capped: bool) -> None:
        """Keep what a try cost.

        Args:
            key: Of the request.
            reason: Why the try failed; `ANSWERED` where it did not.
            charge: From `Budget.settle`.
            capped: Whether the run has a cap on cost.
        """
        row = (key, reason, charge.prompt_tokens, charge.completion_tokens, charge.usd, capped, time.time())
        with self._told():
            self._base.execute("INSERT INTO charges VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def spent_under_caps(self) -> float:
        """USD that runs with a cap on cost have spent, failed tries included."""
        with self._told():
            (usd,) = self._base.execute("SELECT SUM(usd) FROM charges WHERE capped").fetchone()
        return usd or 0.0

    def totals(self) -> dict[str, Any]:
        """Answers, and tokens and USD with those of failed tries, over all runs; USD is None where a price was
        unknown."""
        sums = (
            "SELECT COUNT(*) AS n, SUM(prompt_tokens) AS p, SUM(completion_tokens) AS c, SUM(usd) AS u, COUNT(usd) AS k"
        )
        query = (
            f"SELECT SUM(n), SUM(p), SUM(c), SUM(u), SUM(k) FROM ({sums} FROM answers UNION ALL "
            f"{sums} FROM charges WHERE reason <> '{ANSWERED}')"
        )
        with self._told():
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
        """Leave the file to the next run."""
        if hasattr(self, "_base"):
            self._base.close()
        self._lock.release()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
