"""Log of answers on disk, so that a stopped evaluation resumes and generates no answer twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from lora_llava.core.errors import UserError
from lora_llava.core.storage import atomic_file
from lora_llava.data.files.row_files import json_text
from lora_llava.inference.answer import Answer


class AnswerLog:
    """An append-only JSONL file of answers: first a line with the key of the evaluation, then one line per answer.

    An answer is on disk before the next batch starts. Answers of another evaluation are left untouched: the answers of
    this one then go into a second file beside it.

    Args:
        file: The file; created with its folder.
        key: All that the answers depend on, as plain JSON.
        count: Number of questions.

    Raises:
        UserError: If another process has the file open.
    """

    def __init__(self, file: Path, key: Mapping[str, Any], count: int) -> None:
        self.answers: dict[int, Answer] = {}
        self.damaged = 0
        """Number of unreadable lines, except a last line that a kill cut short."""
        key = json.loads(json.dumps(key))
        self.other = file.is_file() and _key_of(file) not in (None, key)
        """Whether `file` has answers of another evaluation."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
        self.file = file.with_name(file.name.replace(".partial.", f".{name}.partial.")) if self.other else file
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.file.with_name(f".{self.file.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{self.file}: another process is writing to it; wait, or choose another --output"
            ) from None
        lines = self._read(count) if self.file.is_file() and _key_of(self.file) == key else []
        content = [json_text({"key": key}), *lines]
        with atomic_file(self.file) as temporary:  # drops a line that was cut short
            temporary.write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
        self._stream = self.file.open("a", encoding="utf-8")

    def _read(self, count: int) -> list[str]:
        found = self.file.read_text(encoding="utf-8", errors="replace").split("\n")[1:]
        lines: list[str] = []
        for number, line in enumerate(found):
            try:
                index, answer = _entry(json.loads(line), count)
            except (ValueError, KeyError, TypeError, AttributeError):
                self.damaged += number < len(found) - 1  # after the last line break: empty, or cut short
                continue
            self.answers[index] = answer
            lines.append(line)
        return lines

    def add(self, index: int, answer: Answer) -> None:
        """Append one answer."""
        self.answers[index] = answer
        scores = {} if answer.scores is None else {"scores": answer.scores}
        self._stream.write(json_text({"index": index, "text": answer.text, **scores}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file and keep it for the next start."""
        self._stream.close()
        self._lock.release()

    def remove(self) -> None:
        """Remove the file once all answers are in the predictions file."""
        self.close()
        self.file.unlink(missing_ok=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _key_of(file: Path) -> Any:
    """Return the key in the first line of a file; None if it has none."""
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            return json.loads(stream.readline())["key"]
    except (ValueError, KeyError, TypeError):
        return None


def _entry(entry: Mapping[str, Any], count: int) -> tuple[int, Answer]:
    index, text, scores = entry["index"], entry["text"], entry.get("scores")
    if type(index) is not int or not 0 <= index < count or not isinstance(text, str):
        raise ValueError
    return index, Answer(text, scores=None if scores is None else tuple(map(float, scores)))
