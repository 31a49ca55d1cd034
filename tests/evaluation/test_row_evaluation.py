"""Evaluation of rows: answers are kept in order, and a stopped evaluation resumes."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.core.errors import UserError
from lora_llava.data import Conversation, Turn
from lora_llava.evaluation.answer_log import AnswerLog
from lora_llava.evaluation.row_evaluation import (
    UnansweredError,
    evaluate_conversations,
    evaluate_rows,
    evaluate_scienceqa,
    questions_hash,
)
from lora_llava.inference.answer import Answer


def rows_of(count: int) -> list[Conversation]:
    return [
        Conversation(f"r{n}", (Turn("user", f"<image>\nquestion {n}"), Turn("assistant", f"answer {n}")), (f"{n}.png",))
        for n in range(count)
    ]


class Answering:
    """Answers from the last row to the first, with given failures."""

    def __init__(self, stop_after: int | None = None, problems: dict[int, Answer] | None = None) -> None:
        self.stop_after, self.problems = stop_after, problems or {}
        self.asked: list[int] = []

    def __call__(self, rows: Sequence[Conversation], answered: Collection[int]) -> Iterator[tuple[int, Answer]]:
        for index in reversed(range(len(rows))):
            if index in answered:
                continue
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(index)
            yield index, self.problems.get(index, Answer(f"answer {index}"))


def mark(index: int, row: Conversation, answer: Answer) -> dict[str, Any]:
    return {"id": row.row_id, "text": answer.text}


def ask(rows: Sequence[Conversation], answerer: Any, file: Path | None, **settings: Any) -> list[Any]:
    given = {"predictions": file, "description": "test", "key": {"model": "m"}, **settings}
    return evaluate_rows(rows, answerer, mark, **given)


def stored(file: Path) -> int:
    """Count the answers in a store that another connection may have open."""
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as base:
        (count,) = base.execute("SELECT COUNT(*) FROM answers").fetchone()
    return int(count)


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_answers_are_in_the_order_of_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "new" / "predictions.jsonl"
    scored = ask(rows_of(5), Answering(), file)
    assert scored == [{"id": f"r{n}", "text": f"answer {n}"} for n in range(5)]
    assert lines(file) == scored
    assert [path.name for path in file.parent.iterdir()] == ["predictions.jsonl"]


@given(stops=st.lists(st.integers(0, 4), max_size=5))
def test_no_question_is_answered_twice_after_stops(tmp_path_factory: pytest.TempPathFactory, stops: list[int]) -> None:
    file = tmp_path_factory.mktemp("stopped") / "predictions.jsonl"
    asked: list[int] = []
    for stop in stops:
        answering = Answering(stop_after=stop)
        with contextlib.suppress(KeyboardInterrupt):
            ask(rows_of(8), answering, file)
        asked += answering.asked
        if file.exists():
            break
    if not file.exists():
        last = Answering()
        ask(rows_of(8), last, file)
        asked += last.asked
    # An answer is kept before the next is drawn, so that none of these was given for nothing.
    assert sorted(asked) == list(range(8))
    assert lines(file) == [{"id": f"r{n}", "text": f"answer {n}"} for n in range(8)]


def test_an_answer_is_on_disk_before_the_next_question(tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    seen: list[int] = []

    def answering(rows: Sequence[Conversation], answered: Collection[int]) -> Iterator[tuple[int, Answer]]:
        for index in range(len(rows)):
            yield index, Answer("x")
            seen.append(stored(*tmp_path.glob("*.partial.sqlite")))

    ask(rows_of(4), answering, file)
    assert seen == [1, 2, 3, 4]


def test_answers_of_another_evaluation_are_not_reused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "predictions.jsonl"
    for rows, key in ((rows_of(6), {"model": "m"}), (rows_of(7), {"model": "m"}), (rows_of(7), {"model": "n"})):
        answering = Answering(stop_after=3)
        with pytest.raises(KeyboardInterrupt):
            ask(rows, answering, file, key=key)
        assert len(answering.asked) == 3
    assert ": answers of another model, question or setting; this evaluation writes to" in capsys.readouterr().err
    assert [stored(file) for file in tmp_path.glob("*.partial.sqlite")] == [3, 3, 3]  # none replaced another
    again = Answering()
    ask(rows_of(7), again, file, key={"model": "n"})
    assert again.asked == [3, 2, 1, 0]
    assert "3 of 7 answers are in" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [b'{"index": 1, "te', b"\xff\xfe", b'{"index": "x", "text": "y"}\n', b"[]\n"])
@pytest.mark.parametrize("name", ["log.partial.jsonl", "log.0123abcd.partial.jsonl"])
def test_an_older_log_is_read_and_removed(tmp_path: Path, cut: bytes, name: str) -> None:
    old, file = tmp_path / name, tmp_path / "log.jsonl"
    lines = [{"key": {"a": 1}}, {"index": 4, "text": "é\u2028\n", "scores": [-1.5, 0.0]}, {"index": 77, "text": "y"}]
    old.write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode() + cut)
    with AnswerLog(file, {"a": 2}, 10) as log:
        assert (log.answers, log.others, old.exists()) == ({}, [name], True)
        other = log.file
    with AnswerLog(file, {"a": 1}, 10) as log:
        assert log.answers == {4: Answer("é\u2028\n", scores=(-1.5, 0.0))}
        assert not old.exists()
        log.add(5, Answer("b"))
    with AnswerLog(file, {"a": 1}, 10) as log:
        assert log.answers == {4: Answer("é\u2028\n", scores=(-1.5, 0.0)), 5: Answer("b")}
        assert log.others == [other.name]
        with pytest.raises(UserError, match="another run is using it"):
            AnswerLog(file, {"a": 1}, 10)
        log.remove()
    with AnswerLog(file, {"a": 2}, 10) as log:
        assert (log.answers, log.others) == ({}, [])


def test_a_bad_image_is_an_error_or_counts_as_wrong(tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    problems = {2: Answer("", problem="image 2.png is missing", is_image=True)}
    with pytest.raises(UserError, match=r"row r2: image 2\.png is missing; restore it, or .* --bad-images wrong"):
        ask(rows_of(5), Answering(problems=problems), file)
    again = Answering(problems=problems)
    scored = ask(rows_of(5), again, file, bad_images="wrong")
    assert again.asked == [2, 1, 0]  # 4 and 3 were answered before it stopped
    assert scored[2] == {"id": "r2", "text": "", "problem": "image 2.png is missing"}
    assert [line for line in scored if "problem" in line] == [scored[2]]


def test_unanswered_questions_are_named_and_retried(tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    problems = {n: Answer("", problem=f"HTTP {500 + n}") for n in (1, 2, 3, 5)}
    with pytest.raises(UnansweredError) as caught:
        ask(rows_of(6), Answering(problems=problems), file, bad_images="wrong")
    assert str(caught.value) == (
        "4 of 6 questions got no answer (r5: HTTP 505; r3: HTTP 503; r2: HTTP 502; and 1 more); the other answers are "
        "kept; run the same command to evaluate only these"
    )
    assert caught.value.exit_code == 1
    assert not file.exists()
    again = Answering()
    ask(rows_of(6), again, file)
    assert again.asked == [5, 3, 2, 1]


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(ask(rows_of(3), Answering(), None)) == 3
    assert list(tmp_path.iterdir()) == []


def test_questions_are_hashed_by_id_text_and_image() -> None:
    row = rows_of(1)[0]
    others = [
        Conversation("other", row.turns, row.images),
        Conversation(row.row_id, row.turns, ("b.png",)),
        Conversation(row.row_id, (Turn("user", "<image>\nwhat?"), row.turns[1]), row.images),
    ]
    assert len({questions_hash([each]) for each in (row, *others)}) == 4
    answer = Conversation(row.row_id, (row.turns[0], Turn("assistant", "other")), row.images)
    assert questions_hash([answer]) == questions_hash([row])


def test_conversations_get_scores_losses_types_and_sources() -> None:
    rows = [
        Conversation(
            "a",
            (Turn("user", "<image>\nHow many?"), Turn("assistant", "answer 0")),
            ("1.png",),
            {"source": "one", "type": "counting"},
        ),
        Conversation("b", (Turn("user", "What?"), Turn("assistant", "yes")), (), {"source": "two"}),
    ]
    table, scored = evaluate_conversations(
        rows, Answering(), lambda: {0: (6.0, 4), 1: (1.0, 1)}, predictions=None, description="test"
    )
    assert [(line["exact"], line["type"], line["loss"]) for line in scored] == [
        (True, "counting", 1.5),
        (False, "yes/no", 1.0),
    ]
    assert scored[0]["question"] == "How many?"
    assert list(table) == ["all", "one", "two", "type: yes/no", "type: counting"]
    assert table["all"]["loss"] == 1.4
    without, _ = evaluate_conversations(rows, Answering(), predictions=None, description="test")
    assert without["all"]["loss"] is None


def test_a_server_that_never_answers_stops_the_evaluation(tmp_path: Path) -> None:
    problems = {index: Answer("", problem="no answer within 1 s") for index in range(40)}
    answering = Answering(problems=problems)
    with pytest.raises(UnansweredError, match="8 of 40 questions got no answer"):
        ask(rows_of(40), answering, tmp_path / "predictions.jsonl")
    assert len(answering.asked) <= 9


def test_a_damaged_store_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        ask(rows_of(6), Answering(stop_after=1), tmp_path / "predictions.jsonl")
    (file,) = tmp_path.glob("*.partial.sqlite")
    file.write_bytes(b"not a store of answers, but longer than a header" * 9)
    with pytest.raises(UserError, match=r"is damaged or not an answer store .*; move it away"):
        ask(rows_of(6), Answering(), tmp_path / "predictions.jsonl")


def test_science_qa_s_answers_are_scored() -> None:
    about = {"num_choices": 3, "subject": "natural science", "grade": "grade2", "has_image": False, "has_hint": False}
    rows = [
        Conversation(str(n), (Turn("user", "?"), Turn("assistant", "x")), (), about | {"answer": n}) for n in (0, 1)
    ]
    problems = {0: Answer("The answer is A."), 1: Answer("A. The answer is B.", scores=(-1.23456, -2.0, -0.5))}
    table, scored = evaluate_scienceqa(rows, Answering(problems=problems), predictions=None, description="test")
    assert table["AVG"] == [50.0, 1, 2]
    assert [line["prediction"] for line in scored] == [0, 2]
    assert scored[1]["scores"] == [-1.2346, -2.0, -0.5]
    assert "scores" not in scored[0]
