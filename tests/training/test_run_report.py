"""`lora-llava report`: the report of a run on two files, with complete, missing and damaged files."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.evaluation.answers import answer_table, score_answer
from lora_llava.evaluation.figures.page_tables import score_tables
from lora_llava.evaluation.run_report import rebuild_report
from lora_llava.evaluation.scienceqa import COLUMNS, score
from lora_llava.evaluation.summary import summarise
from lora_llava.evaluation.tables import tables_view
from lora_llava.recipe.io import check_recipe
from lora_llava.training.finetune import finetune
from tests.own_rows import asked, quiet, written

COLOURS = {"first": (200, 0), "second": (0, 200)}
"""Red and blue; of the green an image has ten times its number."""


@pytest.fixture(scope="module")
def trained(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two files whose ids, questions and answers are the same; three images of the second are broken."""
    folder = tmp_path_factory.mktemp("reported")
    for name, (red, blue) in COLOURS.items():
        (folder / name).mkdir()
        for number in range(10):
            Image.new("RGB", (20, 20), (red, 10 * number, blue)).save(folder / name / f"{number}.png")
        written(folder / f"{name}.json", [asked(n, f"{n}.png") for n in range(10)])
    for number in (0, 3, 6):
        (folder / "second" / f"{number}.png").write_text(f"no image {number}")
    content: dict[str, Any] = {
        "stage": 2,
        "output_dir": str(folder / "run"),
        "lora": {"r": 4, "alpha": 8},
        "model": {
            "llm": str(parts / "llm"),
            "vision_tower": str(parts / "vision_tower"),
            "start_from": {"untrained": True},
        },
        "data": {
            "format": "conversations",
            "max_length": 300,
            "system_prompt": "",
            "test_rows": 12,
            "on_bad_image": "drop",
            "sources": [{"path": str(folder / f"{name}.json"), "image_folder": str(folder / name)} for name in COLOURS],
        },
        "training": {"batch_size": 4, "learning_rate": 5e-3, "max_steps": 1, "log_every": 1},
        "evaluation": {"max_new_tokens": 2, "before": 0, "batch_size": 8},
    }
    metrics = finetune(check_recipe(content, "test"), Path(), console=quiet())
    assert sum(metrics["data"]["test"]["dropped"].values()) > 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The run and its data at a place of their own."""
    folder = tmp_path / "own"
    shutil.copytree(trained, folder)
    recipe = folder / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(trained), str(folder)))
    return folder / "run"


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions_after.jsonl").read_text().splitlines()]


def cards(page: str) -> list[tuple[str, tuple[int, ...] | None]]:
    """Of each card its id and its image's colour, None without an image."""
    found = []
    for card in re.findall(r"<article.*?</article>", page, re.DOTALL):
        image = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", card)
        pixel = Image.open(io.BytesIO(base64.b64decode(image[1]))).convert("RGB").getpixel((5, 5)) if image else None
        found.append((re.findall(r'<bdi class="id">(.*?)</bdi>', card)[0], pixel))
    return found


def test_dropped_rows_do_not_shift_images(run: Path) -> None:
    page = (run / "report.html").read_text()
    expected = []
    for line in lines(run):
        red, blue = COLOURS[line["source"]]
        expected.append((line["question_id"], (red, 10 * int(line["question_id"][1:]), blue)))
    assert sorted(cards(page)) == sorted(expected)
    (run / "report.html").unlink()
    assert cards(rebuild_report(str(run)).read_text()) == cards(page)


def test_a_row_with_a_missing_image_is_shown_with_a_note(run: Path) -> None:
    gone = next(line for line in lines(run) if line["source"] == "first")
    (run.parent / "first" / f"{gone['question_id'][1:]}.png").write_bytes(b"")
    page = rebuild_report(str(run)).read_text()
    assert (gone["question_id"], None) in cards(page)
    assert len(cards(page)) == len(lines(run))
    assert f"Shown without an image that can no longer be opened: {gone['question_id']}." in page


def test_a_report_without_answers_states_the_reason(run: Path) -> None:
    (run / "predictions_after.jsonl").unlink()
    page = rebuild_report(str(run)).read_text()
    assert "No gallery of answers: predictions_after.jsonl is not in the run" in page
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"after": None}))
    assert (
        "No gallery of answers: the run evaluated no questions after training." in rebuild_report(str(run)).read_text()
    )


def without(*keys: str) -> Any:
    def spoil(content: str) -> str:
        metrics = json.loads(content)
        place = metrics
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]
        return json.dumps(metrics)

    return spoil


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("predictions_after.jsonl", lambda text: text[:-20], r"line \d+: not JSON"),
        ("predictions_after.jsonl", lambda text: text[: text.rindex("\n", 0, -1) + 1], r"has \d+ answers, the"),
        ("predictions_after.jsonl", lambda text: text.replace('"text"', '"said"'), "line 1: no text;"),
        (
            "predictions_after.jsonl",
            lambda text: text.replace("Is it", "Was it"),
            "answers questions that the run's",
        ),
        ("predictions_after.jsonl", lambda text: text + "\udcff", "is not UTF-8"),
        ("metrics.json", lambda text: text[:200], "Invalid JSON: EOF"),
        ("metrics.json", lambda text: "\udcff" + text, "Invalid JSON: "),
        ("metrics.json", lambda text: "[]", "Input should be an object"),
        ("metrics.json", without("train", "loss_curve"), "train.loss_curve: Field required"),
        ("metrics.json", without("after", "all", "f1"), "after.all.f1: Field required"),
        ("metrics.json", without("model"), "model: Field required"),
        ("metrics.json", lambda text: text.replace('"steps": 1', '"steps": "1"'), "train.steps: Input should be"),
    ],
)
def test_a_damaged_file_is_named(
    run: Path, name: str, spoil: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / name
    before = file.read_text()
    file.write_text(spoil(before), errors="surrogateescape")
    assert file.read_text(errors="surrogateescape") != before
    assert main("report", [str(run)]) == 2
    err = capsys.readouterr().err
    assert re.search(rf"^error: {re.escape(str(file))}[:,]? {message}", err)
    assert err.count("\n") == 1


def test_a_science_table_without_a_column_is_named(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    table = score([]) | {"AVG": [50.0, 1, 2]}
    del table["G1-6"]
    (run / "metrics.json").write_text(json.dumps(metrics | {"before": table, "after": None}))
    with pytest.raises(UserError, match=r"metrics\.json: before\.G1-6: Input should be a valid"):
        rebuild_report(str(run))


# --- figures of no questions ---------------------------------------------------------------------------------------


def shown(view: Any) -> list[list[str]]:
    """The cells of a printed table, line by line."""
    stream = io.StringIO()
    Console(file=stream, width=200).print(view)
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in stream.getvalue().splitlines() if "│" in line]


def test_columns_without_questions_are_dashes() -> None:
    table = score([{"question_id": "1", "text": "", "prediction": 0, "answer": 1, "categories": ["NAT", "NO"]}])
    percentages = ["0.00" if column in ("AVG", "NAT", "NO") else "–" for column in COLUMNS]
    low, high = ([end if each == "0.00" else "–" for each in percentages] for end in ("0.00", "79.35"))
    assert shown(tables_view("T", {"run": table}))[:3] == [
        ["run", *percentages, "0"],
        ["95% interval from", *low, ""],
        ["to", *high, ""],
    ]
    [page] = score_tables({"after": table})
    assert [row[1:] for row in page.rows] == [percentages, low, high, [str(table[column][2]) for column in COLUMNS]]
    found = summarise(table, [])["table"]
    assert found["SOC"] == {"percent": None, "correct": 0, "count": 0, "interval": None}
    assert found["NAT"] == {"percent": 0.0, "correct": 0, "count": 1, "interval": [0.0, 79.35]}


def test_scores_of_no_questions_are_dashes() -> None:
    none, one = answer_table([]), answer_table([score_answer("1", "a", "?", "x", "y")])
    stream = io.StringIO()
    Console(file=stream, width=80).print(tables_view("T", {"a": none, "b": one}))
    assert [line.split() for line in stream.getvalue().splitlines()[5:]] == [
        ["a", "–", "–", "–", "–", "0"],
        ["b", "0.00", "0.0–79.3", "0.00", "0.00", "1"],
    ]
    assert [row[1:5] for row in score_tables({"a": none, "b": one})[0].rows] == [
        ["–"] * 4,
        ["0.00", "0.0–79.3", "0.00", "0.00"],
    ]
    marks = {"exact_match": None, "f1": None, "rouge_l": None, "loss": None, "questions": 0}
    assert summarise(none, [])["table"]["all"] == marks | {"exact_match_interval": None}
