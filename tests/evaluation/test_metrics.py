"""The metrics for the `evaluate` library, in a process without network, cache or model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import evaluate
import pytest

from lora_llava.evaluation.metrics import AnswerMatch, ScienceQAAccuracy


def question(answer: int, *categories: str) -> dict[str, object]:
    return {"answer": answer, "num_choices": 3, "categories": list(categories)}


def test_accuracy_over_the_columns_that_have_questions() -> None:
    metric = ScienceQAAccuracy()
    assert isinstance(metric, evaluate.Metric)
    found = metric.compute(
        predictions=["The answer is B.", "A", "no idea", "C. iron"],
        references=[question(1, "NAT", "IMG"), question(1, "NAT"), question(0), question(2, "SOC")],
    )
    assert found == {"accuracy": 50.0, "NAT": 50.0, "SOC": 100.0, "IMG": 100.0, "unparsed": 25.0}


def test_an_unknown_category_is_named() -> None:
    metric = ScienceQAAccuracy()
    with pytest.raises(
        ValueError, match="categories: 'ART' is unknown; use those of NAT, SOC, LAN, TXT, IMG, NO, G1-6"
    ):
        metric.compute(predictions=["A"], references=[question(0, "NAT", "ART")])
    with pytest.raises(ValueError, match="'AVG' is unknown"):  # it would count the question twice
        ScienceQAAccuracy().compute(predictions=["A"], references=[question(0, "AVG")])


def test_answers_can_be_added_one_by_one() -> None:
    metric = ScienceQAAccuracy()
    metric.add(prediction="A", reference=question(0))
    metric.add_batch(predictions=["B", "C"], references=[question(0), question(2)])
    assert metric.compute() == {"accuracy": 66.67, "unparsed": 0.0}


def test_free_answers() -> None:
    found = AnswerMatch().compute(predictions=["The cat sat.", "dog"], references=["a cat sat", "a cat"])
    assert found == {"exact_match": 50.0, "f1": 50.0, "rouge_l": 33.33}


def test_metrics_need_no_network(tmp_path: Path) -> None:
    script = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "from lora_llava.evaluation.metrics import ScienceQAAccuracy\n"
        "q = {'answer': 0, 'num_choices': 2, 'categories': []}\n"
        "print(ScienceQAAccuracy().compute(predictions=['A'], references=[q]))\n"
    )
    environment = {"HF_HOME": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "{'accuracy': 100.0, 'unparsed': 0.0}\n"
