"""Answers as they come, on disk: a stopped evaluation goes on where it was, and nothing is asked twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from lora_llava.data.files import json_text
from lora_llava.inference.answer import Answer


class AnswerLog:
    """A JSONL file that is only appended to: what is asked of whom in its first line, then an answer a line.

    An answer is on disk before the next batch is asked; of a line that was cut off, and of a file that is of another
    evaluation, nothing is taken.

    Args:
        file: Where it is; made with its folder.
        key: What the answers depend on, as plain JSON.
    """

    def __init__(self, file: Path, key: Mapping[str, Any]) -> None:
        self.file = file
        self.answers: dict[int, Answer] = {}
        self.other = False
        """Whether answers of another evaluation were there, and have given way."""
        lines = self._read(json.loads(json.dumps(key)))
        file.parent.mkdir(parents=True, exist_ok=True)
        content = [json_text({"key": key}), *lines]
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
        temporary.replace(file)  # without what was cut off
        self._stream = file.open("a", encoding="utf-8")

    def _read(self, key: Any) -> list[str]:
        if not self.file.is_file():
            return []
        lines: list[str] = []
        with self.file.open(encoding="utf-8", errors="replace") as stream:
            for number, line in enumerate(stream):
                try:
                    entry = json.loads(line)
                    if number == 0:
                        self.other = entry["key"] != key
                        if self.other:
                            return []
                        continue
                    self.answers[int(entry["index"])] = _answer(entry)
                except (ValueError, KeyError, TypeError, AttributeError):
                    break  # the write that the kill cut short
                lines.append(line.rstrip("\n"))
        return lines

    def add(self, index: int, answer: Answer) -> None:
        """Keep one answer."""
        self.answers[index] = answer
        scores = {} if answer.scores is None else {"scores": answer.scores}
        self._stream.write(json_text({"index": index, "text": answer.text, **scores}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave the file for the next start."""
        self._stream.close()

    def remove(self) -> None:
        """Take the file away: everything was answered, and stands elsewhere."""
        self.close()
        self.file.unlink(missing_ok=True)

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _answer(entry: Mapping[str, Any]) -> Answer:
    scores = entry.get("scores")
    return Answer(str(entry["text"]), scores=None if scores is None else tuple(map(float, scores)))
