"""LLaVA-Bench's files, and the table of relative scores."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llava_bench_files import QUESTION, bench, options, write
from rich.console import Console

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.evaluation.judge.judge_report import judge_table, ratio_interval, relative_score, tabulate
from lora_llava.evaluation.judge.judging import Verdict
from lora_llava.evaluation.judge.llava_bench import (
    BenchQuestion,
    read_answers,
    read_cases,
    read_contexts,
    read_questions,
)
from lora_llava.evaluation.judge.review import JudgeCase


def test_questions_of_either_benchmark(tmp_path: Path) -> None:
    rows = [
        QUESTION,
        {"image": "001.jpg", "text": " Describe\u2028it. ", "category": "llava_bench_detail", "question_id": 1},
        {"question_id": "x", "image": "1.jpg", "text": "Why?", "category": "Complex", "answer_id": "left alone"},
    ]
    file = write(tmp_path / "questions.jsonl", rows)
    file.write_text(
        "\n" + json.dumps(rows[0]) + "\r\n" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows[1:])
    )
    assert read_questions(file) == [
        BenchQuestion("0", "1.jpg", "conv", "What is it?"),
        BenchQuestion("1", "001.jpg", "detail", " Describe\u2028it. "),
        BenchQuestion("x", "1.jpg", "complex", "Why?"),
    ]


def test_contexts_of_either_benchmark(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "id": "1", "image": "1.jpg", "captions": ["A dog. ", "It sits."], "instances": [
                {"category": "dog", "bbox": [0.1, 0.25, 0.5, 1.0]}, {"category": "cup", "bbox": [0, 0, 1, 1]},
            ],
        },
        {"id": "2", "image": "2.jpg", "captions": ["A cat."], "instances": []},
        {"id": "001", "image": "001.jpg", "caption": "A hill by the sea."},
        {"id": "002", "image": "002.jpg", "caption": ["A hill.", "The sea."]},
    ]  # fmt: skip
    head = "What people wrote about the image:"
    boxes = "\n".join([
        "Objects with the corners of their boxes, left, top, right, bottom, as fractions of the image's width and "
        "height:",
        "- dog: 0.100, 0.250, 0.500, 1.000",
        "- cup: 0.000, 0.000, 1.000, 1.000",
    ])  # fmt: skip
    assert read_contexts(write(tmp_path / "context.jsonl", rows)) == {
        "1.jpg": f"{head}\n- A dog.\n- It sits.\n\n{boxes}",
        "2.jpg": f"{head}\n- A cat.",
        "001.jpg": f"{head}\n- A hill by the sea.",
        "002.jpg": f"{head}\n- A hill.\n- The sea.",
    }


def test_answers(tmp_path: Path) -> None:
    rows = [{"question_id": 0, "text": "A\nb", "category": "conv"}, {"question_id": "1", "prompt": "?", "text": ""}]
    assert read_answers(write(tmp_path / "answers.jsonl", rows)) == {"0": "A\nb", "1": ""}


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in QUESTION.items() if name != field}


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["{"], "line 1: not JSON; it should hold one object a line"),
        (["[1]"], "line 1: not an object, but list"),
        ([json.dumps(QUESTION)] * 2, "line 2: question_id '0' appears twice; keep one"),
        (["", json.dumps(without("question_id"))], "line 2: question_id is None; it should be a number or a name"),
        ([json.dumps(QUESTION | {"question_id": 1.5})], "line 1: question_id is 1.5; it should be a number or a name"),
        ([json.dumps(without("image"))], "line 1: image is None; it should be a text"),
        ([json.dumps(QUESTION | {"text": " "})], "line 1: text is ' '; it should be a text"),
        ([json.dumps(QUESTION | {"category": "ocr"})], "category 'ocr' is unknown; use one of conv, detail, complex"),
        (["", " "], "is empty; give one of LLaVA-Bench's JSONL files"),
    ],
)
def test_a_question_that_is_none_is_told_with_its_line(tmp_path: Path, lines: list[str], told: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        read_questions(file)
    assert str(file) in str(error.value)
    assert told in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.jsonl is missing"):
        read_answers(tmp_path / "none.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match=r"bytes.jsonl is not UTF-8: invalid start byte at byte 7; save it as UTF-8"):
        read_answers(tmp_path / "bytes.jsonl")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"image": "1.jpg"}, "caption should be a text or a list of texts"),
        ({"image": "1.jpg", "captions": []}, "captions should be a text or a list of texts"),
        ({"image": "1.jpg", "captions": ["a", 1]}, "captions should be a text or a list of texts"),
        ({"image": "1.jpg", "captions": ["a"], "instances": [{"category": "dog"}]}, "a bbox of four numbers each"),
        (
            {"image": "1.jpg", "captions": ["a"], "instances": [{"category": "a", "bbox": [1]}]},
            "a bbox of four numbers",
        ),
    ],
)
def test_contexts_that_are_none(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        read_contexts(write(tmp_path / "context.jsonl", [row]))


def test_files_are_put_together(tmp_path: Path) -> None:
    cases = read_cases(*bench(tmp_path).values())
    text = "What people wrote about the image:\n- A dog."
    assert cases == [
        JudgeCase("0", "conv", "What is in 0?", text, "gpt 0", "ours 0"),
        JudgeCase("1", "detail", "What is in 1?", text, "gpt 1", "ours 1"),
        JudgeCase("2", "complex", "What is in 2?", text, "gpt 2", "ours 2"),
    ]


def test_what_is_missing_or_too_much_is_named(tmp_path: Path) -> None:
    files = bench(tmp_path, 6)
    write(files["reference"], [{"question_id": 3, "text": "a"}])
    with pytest.raises(UserError) as error:
        read_cases(*files.values())
    assert str(error.value) == (f"{files['reference']}: 5 missing: answer to question_id '0', '1', '2' and 2 more")
    files = bench(tmp_path, 6)
    write(files["answers"], [{"question_id": number, "text": "a"} for number in range(8)])
    with pytest.raises(UserError, match=r"question_id '6', '7' not in .*questions.jsonl; is it of another benchmark\?"):
        read_cases(*files.values())
    files = bench(tmp_path, 6)
    write(files["context"], [{"image": "2.jpg", "caption": "a"}])
    with pytest.raises(UserError, match=r"context.jsonl: 1 missing: context for image '1.jpg'"):
        read_cases(*files.values())


def verdict(category: str, answer: float | None, reference: float | None, status: str = "scored") -> Verdict:
    return Verdict(JudgeCase("0", category, "", "", "", ""), status, reference, answer)


def test_relative_scores_are_mean_over_mean() -> None:
    verdicts = [
        *(verdict("conv", 6, 8), verdict("conv", 9, 10), verdict("complex", 5, 4)),
        *(verdict("complex", None, None, status) for status in ("unparsed", "failed", "not asked")),
    ]
    table = tabulate(verdicts)
    assert list(table) == ["conv", "complex", "all"]
    counts = {"questions": 2, "scored": 2, "unparsed": 0, "failed": 0, "not asked": 0}
    assert table["conv"] == counts | {"answer": 7.5, "reference": 9.0, "relative": 83.33, "interval": [75.0, 90.0]}
    counts = {"questions": 4, "scored": 1, "unparsed": 1, "failed": 1, "not asked": 1}
    assert table["complex"] == counts | {"answer": 5.0, "reference": 4.0, "relative": 125.0, "interval": None}
    assert (table["all"]["relative"], table["all"]["scored"], table["all"]["questions"]) == (90.91, 3, 6)


def test_nothing_scored_has_no_relative_score() -> None:
    row = tabulate([verdict("conv", None, None, "unparsed")])["all"]
    assert (row["answer"], row["reference"], row["relative"], row["interval"]) == (None, None, None, None)
    assert relative_score([1.0], [0.0]) is None


def test_what_has_no_interval_says_so_in_json_and_in_the_table() -> None:
    assert ratio_interval([], []) is None
    assert ratio_interval([5.0], [4.0]) is None
    assert ratio_interval([5.0, 6.0], [0.0, 0.0]) is None
    assert ratio_interval([5.0, 6.0], [0.0, 8.0]) is None  # a quarter of the draws has the first alone
    assert ratio_interval([5.0, 5.0], [4.0, 4.0]) == (125.0, 125.0)
    table = tabulate([verdict("conv", 5, 0), verdict("conv", 6, 8), verdict("detail", None, None, "unparsed")])
    assert json.loads(json.dumps(table, allow_nan=False))["conv"]["interval"] is None
    stream = io.StringIO()
    Console(file=stream, width=120).print(judge_table(table, "T"))
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
            for line in stream.getvalue().splitlines() if len(cells := line.split("│")) > 3}  # fmt: skip
    assert rows["conv"] == ["2", "5.50", "4.00", "137.5", "–", "0"]
    assert rows["detail"] == ["1", "–", "–", "–", "–", "1"]
    zero = tabulate([verdict("conv", 5, 0)])  # scored, and nothing to divide by
    judge_table(zero, "T")
    assert (zero["all"]["answer"], zero["all"]["relative"]) == (5.0, None)


def test_the_interval_resamples_questions_with_both_scores() -> None:
    rng = np.random.default_rng(1)
    references = rng.uniform(6, 10, 60)
    answers = references * 0.8 + rng.normal(0, 0.1, 60)
    low, high = ratio_interval(list(answers), list(references))
    assert (low, high) == ratio_interval(list(answers), list(references))
    picks = rng.integers(0, 60, (20_000, 60))
    expected = np.percentile(100 * answers[picks].sum(1) / references[picks].sum(1), [2.5, 97.5])
    assert (low, high) == pytest.approx(expected, abs=0.1)
    assert high - low < 1.5  # resampled apart it would be about ten times as wide


def test_a_dry_run_prints_prompts_and_cost_and_needs_neither_server_nor_torch(tmp_path: Path) -> None:
    files = bench(tmp_path, 4)
    script = (
        "import sys\n"
        "from lora_llava.commands.main import main\n"
        "assert main(None, sys.argv[1:]) == 0\n"
        "print('heavy:', sorted({'torch', 'transformers', 'scipy', 'datasets'} & set(sys.modules)))\n"
    )
    call = ["score", "llava-bench", *options(files), "--dry-run", "--price-in", "1000", "--price-out", "1000"]
    done = subprocess.run([sys.executable, "-c", script, *call], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    for text in ("conv, question 0", "detail, question 1", "complex, question 2", "What is in 2?", "gpt 2", "ours 2"):
        assert done.stdout.count(text) == 1
    assert "8 of 8 judgements to ask for" in done.stdout
    assert "at most 8,192 back; up to 1" in done.stdout
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in files.values())


def test_mistakes_in_the_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = options(bench(tmp_path))
    for more, told in (
        ([], "--judge-url is missing"),
        (["--judge-url", "localhost"], "the server's URL is 'localhost'"),
        (["--max-cost", "1"], "--max-cost needs the model's prices; give --price-in and --price-out"),
        (["--price-in", "1"], "--price-in and --price-out go together"),
        (["--price-in", "-1", "--price-out", "1"], "--price-in is -1.0; give 0 or more USD"),
        (["--judge-url", "http://a", "--timeout", "0"], "timeout is 0"),
        (["--dry-run", "--prompts", str(tmp_path)], "system.txt is missing; copy it from"),
    ):
        assert main(None, ["score", "llava-bench", *arguments, *more]) == 2
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        main(None, ["score", "llava-bench", *arguments, "--judge-temperature", "5"])
    assert error.value.code == 2
    assert "5 should be from 0 to 2, or default" in capsys.readouterr().err
