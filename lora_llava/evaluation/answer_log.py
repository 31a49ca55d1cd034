"""Keep the answers of an evaluation on disk, so that a stopped one resumes and generates no answer twice."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from lora_llava.inference.answer import Answer
from lora_llava.inference.client.answer_store import AnswerStore, answer_key
from lora_llava.inference.client.chat_request import ChatAnswer


class AnswerLog:
    """The answers of one evaluation in an `AnswerStore`, each on disk before the next question is asked.

    Args:
        predictions: The file of the evaluation's answers, `NAME.jsonl`. The store stands beside it, as
            `NAME.HASH.partial.sqlite`, where HASH is computed from `key`. Answers of this evaluation that an earlier
            version wrote to `NAME.*partial.jsonl` are moved into it.
        key: All that the answers depend on, as plain JSON.
        count: Number of questions.

    Raises:
        UserError: If another process uses the store, or it is damaged.
    """

    def __init__(self, predictions: Path, key: Mapping[str, Any], count: int) -> None:
        self.answers: dict[int, Answer] = {}
        self._key = json.loads(json.dumps(key))
        self.file = predictions.with_suffix(f".{answer_key(self._key)[:8]}.partial.sqlite")
        self._store = AnswerStore(self.file)
        if not self._store.is_empty():
            self._read(count)
        name = glob.escape(predictions.stem)
        for old in sorted(predictions.parent.glob(f"{name}.*partial.jsonl")):
            if self._copy(old, count):
                old.unlink()
                old.with_name(f".{old.name}.lock").unlink(missing_ok=True)
        beside = [file for end in ("sqlite", "jsonl") for file in predictions.parent.glob(f"{name}.*partial.{end}")]
        self.others = sorted(file.name for file in beside if file != self.file)
        """Names of the stores of other evaluations that have the same predictions file."""

    def _files(self) -> list[Path]:
        return [self.file.with_name(f"{self.file.name}{end}") for end in ("", "-wal", "-shm", ".lock")]

    def _read(self, count: int) -> None:
        for index in range(count):
            stored = self._store.get(answer_key(self._key, index))
            if stored is not None:
                self.answers[index] = _decode(json.loads(stored.text))

    def _copy(self, old: Path, count: int) -> bool:
        """Copy the answers of an older log; return whether they are of this evaluation."""
        first, *lines = old.read_text(encoding="utf-8", errors="replace").split("\n")
        try:
            if json.loads(first)["key"] != self._key:
                return False
        except (ValueError, KeyError, TypeError):
            return False
        with self._store.transaction():
            for line in lines:
                try:
                    entry = json.loads(line)
                    index, answer = entry["index"], _decode(entry)
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue  # cut off when the process was killed: the question is asked again
                if type(index) is int and 0 <= index < count and index not in self.answers:
                    self.add(index, answer)
        return True

    def add(self, index: int, answer: Answer) -> None:
        """Store one answer."""
        self.answers[index] = answer
        text = json.dumps({"text": answer.text, "scores": answer.scores})
        self._store.add(answer_key(self._key, index), str(index), 0, "", ChatAnswer(text, 0, 0, ""), None, "", "")

    def close(self) -> None:
        """Close the store and keep it for the next start."""
        self._store.close()

    def remove(self) -> None:
        """Remove the store once all answers are in the predictions file."""
        self.close()
        for file in self._files():
            file.unlink(missing_ok=True)

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _decode(entry: Mapping[str, Any]) -> Answer:
    text, scores = entry["text"], entry.get("scores")
    if not isinstance(text, str):
        raise ValueError
    return Answer(text, scores=None if scores is None else tuple(map(float, scores)))
