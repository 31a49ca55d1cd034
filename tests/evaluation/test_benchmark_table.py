"""Public benchmarks: their table, how tasks want answers generated, and what the command refuses."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from lora_llava.commands.main import main
from lora_llava.evaluation.lmms.benchmark_table import benchmark_notes, benchmark_rows, numbers, public_tables
from lora_llava.evaluation.lmms.task_questions import file_name, read_settings
from lora_llava.inference.sampling import Sampling

FOUND = {
    "pope": {
        "questions": 9000,
        "before": {"pope_accuracy": 0.5, "pope_f1_score": 0.8},
        "after": {"pope_accuracy": 0.8766, "pope_f1_score": 0.8512},
    },
    "mine": {"questions": 1, "after": {"acc": 1.0}},
    "mme": {"questions": 2374, "before": {"mme_perception_score": 1400.55}},
}


def test_rows_show_published_scores_in_their_unit() -> None:
    assert benchmark_rows(FOUND) == [
        ["pope", "pope_f1_score", "80.0", "85.1", "85.9"],
        ["", "pope_accuracy", "0.5", "0.8766", "–"],
        ["mine", "acc", "–", "1", "–"],
        ["mme", "mme_perception_score", "1400.5", "–", "1510.7"],
    ]


def test_notes_name_the_source_of_published_scores() -> None:
    counts, source = benchmark_notes(FOUND)
    assert counts == "Questions: 9,000 of pope, 1 of mine, 2,374 of mme. Scored by lmms-eval."
    assert "arXiv 2310.03744" in source
    assert source.endswith("; pope: published as the mean of three subsets.")
    assert len(benchmark_notes({"mine": FOUND["mine"]})) == 1


def test_the_table_of_a_page_is_there_only_with_scores() -> None:
    assert public_tables({}) == []
    [table] = public_tables({"benchmarks": FOUND})
    assert (table.title, len(table.rows)) == ("Public benchmarks", 4)


def test_scores_are_read_from_lmms_evals_results() -> None:
    results: dict[str, Any] = {
        "alias": "pope",
        "pope_f1_score,none": 0.85,
        "pope_f1_score_stderr,none": 0.01,
        "acc,flexible": 1,
        "submission,none": None,
        "samples": 30,
    }
    assert numbers(results) == {"pope_f1_score": 0.85, "acc (flexible)": 1.0}


def test_settings_of_a_task() -> None:
    greedy = read_settings({"until": ["ASSISTANT:", ""], "num_beams": 1, "image_aspect_ratio": "original"})
    assert greedy.sampling == Sampling(0.0, 1.0, 1024, 0)
    assert (greedy.until, greedy.unused) == (("ASSISTANT:",), ())
    assert greedy.cut("A dog. ASSISTANT: A cat.") == "A dog. "
    assert greedy.cut("A dog.") == "A dog."
    drawn = read_settings({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 8, "until": "\n\n", "num_beams": 3})
    assert drawn.sampling == Sampling(0.7, 0.9, 8, 0)
    assert (drawn.until, drawn.unused) == (("\n\n",), ("num_beams=3",))
    assert read_settings({"temperature": 0.7, "do_sample": False}).sampling.temperature == 0
    assert read_settings({"temperature": None, "top_p": None, "until": None}).sampling == greedy.sampling


def test_the_first_of_several_ends_cuts_an_answer() -> None:
    assert read_settings({"until": ["cat", "dog"]}).cut("a dog and a cat") == "a "


def test_a_name_of_a_task_becomes_one_of_a_file() -> None:
    assert file_name("a/b: ä") == "a_b_ä"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--benchmark", "pope"], "should be llava-bench, or lmms:TASK,TASK such as lmms:pope,gqa"),
        (["--benchmark", "lmms:,"], "should be llava-bench, or lmms:TASK,TASK such as lmms:pope,gqa"),
        (["--benchmark", "lmms:pope", "--temperature", "1"], "--temperature has no effect with --benchmark lmms:pope"),
        (["--benchmark", "lmms:pope", "--bad-images", "wrong"], "--bad-images has no effect"),
        (["--benchmark", "lmms:pope", "--images", "x"], "--images needs --benchmark llava-bench"),
        (["--benchmark", "lmms:pope", "--shuffle-images"], "--shuffle-images has no effect"),
        (["--benchmark", "lmms:pope", "data.path=x"], "an override of a recipe has no effect"),
        (
            ["--benchmark", "lmms:pope", "--base-only", "--server", "http://127.0.0.1:1"],
            "--base-only needs a local model",
        ),
        (["--benchmark", "llava-bench", "--limit", "3"], "--limit has no effect with --benchmark llava-bench"),
    ],
)
def test_flags_without_effect_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main("evaluate", ["run", *flags])
    except SystemExit as error:  # argparse's own
        code = int(error.code or 0)
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_a_missing_lmms_eval_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("evaluate", ["run", "--benchmark", "lmms:pope"]) == 2
    error = capsys.readouterr().err
    assert error == "error: --benchmark lmms: lmms-eval is not installed; pip install 'lora_llava[bench]'\n"
