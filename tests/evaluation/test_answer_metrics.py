"""`METRICS` is the one definition of a metric: an added entry appears everywhere."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from compared import compared, own
from rich.console import Console

from lora_llava.evaluation import run_report
from lora_llava.evaluation.answer_metrics import METRICS, Metric, worst_scores
from lora_llava.evaluation.answers import answer_table
from lora_llava.evaluation.compare.compare_view import as_json, render
from lora_llava.evaluation.figures.figure_lines import FigureLine, cells
from lora_llava.evaluation.metrics import AnswerMatch
from lora_llava.evaluation.summary import summarise
from lora_llava.evaluation.tables import tables_view
from lora_llava.publishing.card import model_card


def first_letter_error(prediction: str, reference: str) -> float:
    return float(prediction[:1] != reference[:1])


def without_letter(rows: list[Any]) -> list[Any]:
    """The same answers, as a run wrote them before the metric existed."""
    return [{key: value for key, value in row.items() if key != "letter"} for row in rows]


@pytest.fixture
def letter(monkeypatch: pytest.MonkeyPatch) -> Metric:
    metric = Metric("letter", "letter error", first_letter_error, higher_is_better=False)
    monkeypatch.setitem(METRICS, "letter", metric)
    return metric


def test_keys_and_headings_are_those_of_saved_runs() -> None:
    assert [(metric.key, metric.saved_as, metric.heading) for metric in METRICS.values()] == [
        ("exact", "exact_match", "exact match in %"),
        ("f1", "f1", "F1 in %"),
        ("rouge_l", "rouge_l", "ROUGE-L in %"),
        ("loss", "loss", "loss"),
    ]
    assert [metric.higher_is_better for metric in METRICS.values()] == [True, True, True, False]
    assert json.dumps(worst_scores()) == '{"exact": false, "f1": 0.0, "rouge_l": 0.0}'


def test_an_added_metric_is_in_records_and_tables(letter: Metric) -> None:
    rows = own("red cube", "blue cube")
    assert [row["letter"] for row in rows] == [0.0, 1.0]
    assert worst_scores()["letter"] == 1.0
    table = answer_table(rows)
    assert table["all"]["letter"] == 50.0
    assert summarise(table, rows)["table"]["all"]["letter"] == 50.0
    stream = io.StringIO()
    Console(file=stream, width=200).print(tables_view("T", {"after": table}))
    lines = stream.getvalue().splitlines()
    assert lines[2].split() == ["match", "F1", "ROUGE-L", "error"]  # headings end with "in %" in the line below
    assert lines[5].split() == ["after", "50.00", "9.5–90.5", "75.00", "75.00", "50.00", "2"]
    assert AnswerMatch().compute(predictions=["a", "b"], references=["a", "a"])["letter"] == 50.0


def test_an_added_metric_is_on_the_report_page(letter: Metric) -> None:
    [page] = run_report.score_tables({"after": answer_table(own("red cube", "blue cube"))})
    assert page.columns == [
        *["", "exact match in %", "95% interval", "F1 in %", "ROUGE-L in %", "loss", "letter error in %", "questions"]
    ]
    assert page.rows == [["after", "50.00", "9.5–90.5", "75.00", "75.00", "", "50.00", "2"]]
    assert page.groups == []


def test_an_added_metric_is_compared(letter: Metric, tmp_path: Path) -> None:
    found = compared(tmp_path, {"a": own("red cube", "blue cube"), "b": own("red", "red cube")})
    assert found.columns == ["exact match", "F1", "ROUGE-L", "letter error"]
    assert found.groups[0].columns["letter error"] == [50.0]
    assert "letter error" in render(found, "markdown")
    assert json.loads(as_json(found))["groups"][1]["columns"]["letter error"]["mean"] == 0.0


def test_an_added_metric_is_on_the_model_card(letter: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_card, "_measured", lambda package: "Measured.")
    monkeypatch.setattr(model_card, "data_name", lambda package: "the data")
    package: Any = SimpleNamespace(metrics={})
    card = model_card._answers(package, {"after": answer_table(own("red cube", "blue cube"))})
    assert "exact match (SQuAD's rule), word F1 (SQuAD's rule), ROUGE-L, letter error." in card
    assert "| exact match in % | 95% interval | F1 in % | ROUGE-L in % | letter error in % | questions |" in card
    assert "| all | after training | 50.00 | 9.5–90.5 | 75.00 | 75.00 | 50.00 | 2 |" in card


def test_runs_saved_before_a_metric_existed_stay_readable(letter: Metric, tmp_path: Path) -> None:
    old = without_letter(own("red cube"))
    assert "letter error" not in compared(tmp_path, {"a": own("red cube"), "b": old}).groups[1].columns
    scores = answer_table(own("red cube"))["all"]
    del scores["letter"]
    assert cells(FigureLine("all", "after", scores)) == ["100.00", "20.7–100.0", "100.00", "100.00", "", "–"]
    run_report._check_table("after", {"all": scores})
