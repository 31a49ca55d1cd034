"""ScienceQA's score: LLaVA's rule for an answer, the table, and files scored from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.commands.main import main
from lora_llava.evaluation.scienceqa import Prediction, categories, make_prediction, parse_answer, score
from lora_llava.evaluation.score_files import score_scienceqa_file

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "scienceqa_sample"


@pytest.mark.parametrize(
    ("text", "choices", "index"),
    [
        ("A", 2, 0),
        ("E", 5, 4),
        ("E", 4, -1),
        ("F", 5, -1),
        ("a", 5, -1),
        ("", 5, -1),
        ("AB", 5, -1),
        (" A", 5, -1),
        ("B. iron", 3, 1),
        ("B. ", 3, 1),
        ("B.", 3, -1),
        ("B.iron", 3, -1),
        ("b. iron", 3, -1),
        ("D. iron", 3, -1),
        ("The answer is C.", 3, 2),
        ("Because. The answer is A. So.", 2, 0),
        ("The answer is C", 3, -1),
        ("The answer is D.", 3, -1),
        ("The answer is F.", 5, -1),
        ("the answer is A.", 3, -1),
        ("The answer is a.", 3, -1),
        ("The answer is  A.", 3, -1),
        ("The answer is A. The answer is A.", 3, -1),
        ("The answer is BE.", 3, 1),
        ("The answer is A\n", 3, -1),
        ("The answer is A, said B. The answer is C.", 3, -1),
        ("A. The answer is B.", 3, 0),
        ("Assistant: x\n The answer is B.\n", 2, 1),
        ("iron", 3, -1),
    ],
)
def test_answers_are_parsed_by_llava_s_rule(text: str, choices: int, index: int) -> None:
    assert parse_answer(text, choices) == index


@given(text=st.text(), choices=st.integers(2, 5))
def test_any_text_names_a_choice_or_none(text: str, choices: int) -> None:
    assert parse_answer(text, choices) in range(-1, choices)


@given(before=st.text("abc .\n"), after=st.text("abc .\n"), choices=st.integers(2, 5), data=st.data())
def test_a_sentence_that_names_one_choice_is_found_anywhere(
    before: str, after: str, choices: int, data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, choices - 1))
    assert parse_answer(f"{before}The answer is {'ABCDE'[index]}.{after}", choices) == index


@pytest.mark.parametrize(
    ("question", "columns"),
    [
        (("natural science", "grade1", False, False), ["NAT", "NO", "G1-6"]),
        (("social science", "grade6", True, False), ["SOC", "IMG", "G1-6"]),
        (("language science", "grade7", False, True), ["LAN", "TXT", "G7-12"]),
        (("natural science", "grade12", True, True), ["NAT", "TXT", "IMG", "G7-12"]),
        (("astrology", "", False, False), ["NO"]),
    ],
)
def test_the_columns_of_a_question(question: tuple[str, str, bool, bool], columns: list[str]) -> None:
    assert categories(*question) == columns


def test_a_prediction_is_scored() -> None:
    question = {
        "answer": 1,
        "num_choices": 2,
        "subject": "natural science",
        "grade": "grade2",
        "has_image": True,
        "has_hint": False,
    }
    assert make_prediction("7", "The answer is B.", question) == {
        "question_id": "7",
        "text": "The answer is B.",
        "prediction": 1,
        "answer": 1,
        "categories": ["NAT", "IMG", "G1-6"],
    }
    assert make_prediction("7", "The answer is C.", question)["prediction"] == -1


def scored(prediction: int, answer: int, *columns: str) -> Prediction:
    return Prediction(question_id="", text="", prediction=prediction, answer=answer, categories=list(columns))


def test_the_table_is_exact() -> None:
    predictions = [
        scored(0, 0, "NAT", "TXT", "IMG", "G1-6"),
        scored(1, 0, "NAT", "NO", "G1-6"),
        scored(2, 2, "SOC", "IMG", "G7-12"),
        scored(-1, 0, "NAT", "TXT", "G7-12"),
        scored(-1, 1, "SOC", "NO", "G1-6"),
        scored(3, 3, "NAT", "NO", "G1-6"),
    ]
    assert score(predictions) == {
        "AVG": [50.0, 3, 6],
        "NAT": [50.0, 2, 4],
        "SOC": [50.0, 1, 2],
        "LAN": [0.0, 0, 0],
        "TXT": [50.0, 1, 2],
        "IMG": [100.0, 2, 2],
        "NO": [33.33, 1, 3],
        "G1-6": [50.0, 2, 4],
        "G7-12": [50.0, 1, 2],
        "unparsed": 2,
    }
    assert score([])["AVG"] == [0.0, 0, 0]


PROBLEM = {
    "question": "Q",
    "choices": ["x", "y", "z"],
    "answer": 1,
    "hint": "",
    "image": None,
    "grade": "grade3",
    "subject": "natural science",
}
PROBLEMS = {
    "1": PROBLEM,
    "2": PROBLEM | {"answer": 0, "hint": "Look.", "image": "image.png", "grade": "grade8", "subject": "social science"},
    "3": PROBLEM | {"answer": 2, "hint": "Look.", "subject": "language science"},
    "4": PROBLEM,
}
ANSWERS = [("3", "A. x"), ("1", "So. The answer is B."), ("2", "The answer is E.")]


class Files:
    """The three files of a score, and the command over them."""

    def __init__(self, folder: Path) -> None:
        self.problems, self.splits, self.answers = (folder / name for name in ("problems", "splits", "answers"))
        self.problems.write_text(json.dumps(PROBLEMS))
        self.splits.write_text(json.dumps({"test": ["1", "2", "3"], "val": ["4"]}))
        self.write_answers(ANSWERS)

    def write_answers(self, answers: list[tuple[str, str]]) -> None:
        lines = [json.dumps({"question_id": pid, "text": text}, ensure_ascii=False) for pid, text in answers]
        self.answers.write_text("\n".join(lines), encoding="utf-8")

    def run(self, *more: str) -> int:
        files = ["--problems", self.problems, "--splits", self.splits, "--answers", self.answers]
        return main(None, ["score", "scienceqa", *map(str, files), *more])


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_synthetic_files_have_the_expected_table(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert files.run("--json") == 0
    output, errors = capsys.readouterr()
    assert json.loads(output) == {
        "AVG": [33.33, 1, 3],
        "NAT": [100.0, 1, 1],
        "SOC": [0.0, 0, 1],
        "LAN": [0.0, 0, 1],
        "TXT": [0.0, 0, 2],
        "IMG": [0.0, 0, 1],
        "NO": [100.0, 1, 1],
        "G1-6": [50.0, 1, 2],
        "G7-12": [0.0, 0, 1],
        "unparsed": 1,
    }
    assert errors == ""


def test_another_split_is_scored_by_its_name(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_answers([("4", "B")])
    assert files.run("--json", "--split", "val") == 0
    assert json.loads(capsys.readouterr().out)["AVG"] == [100.0, 1, 1]


def test_the_table_is_printed(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert files.run() == 0
    cells = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["answers", "33.33", "100.00", *["0.00"] * 4, "100.00", "50.00", "0.00", "1", "(33.3%)"] in cells
    assert ["questions", "3", "1", "1", "1", "2", "1", "1", "2", "1"] in cells


def fails(files: Files, capsys: pytest.CaptureFixture[str], message: str, *more: str) -> None:
    """The command ends with 2, one line on stderr and nothing on stdout."""
    assert files.run("--json", *more) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_a_missing_file_is_named(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.answers.unlink()
    fails(files, capsys, f"{files.answers} is missing; name a JSONL file of question_id and text")
    files.problems.unlink()
    rest = "is missing; a ScienceQA folder holds problems.json, pid_splits.json and images/"
    fails(files, capsys, f"{files.problems} {rest}")


def test_an_unknown_split_names_the_nearest(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    message = f"{files.splits}: no split 'tets' (did you mean \"test\"?); it has test, val"
    fails(files, capsys, message, "--split", "tets")


def test_answers_and_questions_must_fit(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_answers(ANSWERS[:1])
    fails(files, capsys, f"{files.answers}: no answer to 2 of 3 questions, the first '1'")
    files.write_answers([*ANSWERS, ("4", "A")])
    fails(files, capsys, f"{files.answers}: question_id '4' is not in split 'test' of {files.splits}")
    files.write_answers([*ANSWERS, ("1", "A")])
    fails(files, capsys, f"{files.answers}, line 4: question_id '1' appears twice; keep one")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"question_id": "9"}', "'text'"),
        ('{"text": "A"}', "'question_id'"),
        ("[1]", "list indices must be integers or slices, not str"),
        ("A", "Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_a_malformed_line_is_named(files: Files, capsys: pytest.CaptureFixture[str], line: str, problem: str) -> None:
    with files.answers.open("a") as file:
        file.write(f"\n\n{line}\n")
    fails(files, capsys, f"{files.answers}, line 5: needs question_id and text ({problem})")


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\u2029"])
def test_an_answer_may_contain_unicode_line_separators(files: Files, mark: str) -> None:
    files.write_answers([("1", f"a{mark}b The answer is B."), *ANSWERS[::2]])
    table = score_scienceqa_file(files.problems, files.splits, files.answers)
    assert (table["AVG"], table["unparsed"]) == ([33.33, 1, 3], 1)


@pytest.mark.parametrize("field", ["answer", "choices", "subject", "grade"])
def test_a_problem_without_a_field_is_reported(files: Files, field: str) -> None:
    problem = {key: value for key, value in PROBLEM.items() if key != field}
    files.problems.write_text(json.dumps(PROBLEMS | {"2": problem}))
    assert files.run("--json") == 2


def test_answers_that_are_not_utf_8_are_refused(files: Files) -> None:
    files.answers.write_bytes(b"\xff")
    assert files.run("--json") == 2


def expected_scores() -> dict[str, Any]:
    file = SAMPLE / "expected_scores.json"
    return json.loads(file.read_text()) if file.is_file() else {}


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"{SAMPLE} is not here: reference data that is not part of the project")
@pytest.mark.parametrize("name", ["llava_13b_v1_3", "llava_13b_v0"])
def test_published_answers_reach_their_published_score(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--problems", SAMPLE / "problems.json", "--splits", SAMPLE / "pid_splits.json"]
    answers = ["--answers", SAMPLE / f"answers_{name}.jsonl", "--json"]
    assert main(None, ["score", "scienceqa", *map(str, [*files, *answers])]) == 0
    table = json.loads(capsys.readouterr().out)
    assert isinstance(table.pop("unparsed"), int)
    assert {("avg" if column == "AVG" else column): cells for column, cells in table.items()} == expected_scores()[name]
