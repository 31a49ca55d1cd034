"""Comparison of runs: questions, seeds, tests and tables, on predictions written here."""

from __future__ import annotations

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from compared import SEEDS, compared, own, recipe_of, science, written
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.core.errors import UserError
from lora_llava.evaluation.answers import score_answer
from lora_llava.evaluation.compare.compare_files import flatten, read_runs
from lora_llava.evaluation.compare.compare_view import render
from lora_llava.evaluation.compare.comparison import holm, mcnemar
from lora_llava.evaluation.parsing.intervals import share_interval


def test_nine_columns_and_the_interval_of_a_single_run(tmp_path: Path) -> None:
    [group] = compared(tmp_path, {"a": science("rrrw")}).groups
    assert group.columns == {
        "AVG": [75.0],
        "NAT": [100.0],
        "SOC": [50.0],
        "LAN": [None],
        "TXT": [50.0],
        "IMG": [100.0],
        "NO": [None],
        "G1-6": [100.0],
        "G7-12": [50.0],
    }
    assert (group.name, group.deviation("AVG"), group.interval()) == ("a", None, share_interval(3, 4))


def test_columns_of_conversations_have_rouge_if_every_row_has_it(tmp_path: Path) -> None:
    rows = [{**row, "rouge_l": 0.5} for row in own("red cube", "a cube", "x", "cube red")]
    found = compared(tmp_path, {"a": rows, "b": [{k: v for k, v in row.items() if k != "rouge_l"} for row in rows]})
    assert found.groups[0].columns == {
        "exact match": [25.0],
        "F1": [pytest.approx(100 * (1 + 2 / 3 + 0 + 1) / 4)],
        "ROUGE-L": [50.0],
    }
    assert "ROUGE-L" not in found.groups[1].columns
    assert found.columns == ["exact match", "F1", "ROUGE-L"]
    row = next(line for line in render(found, "markdown").splitlines() if line.startswith("| b "))
    assert row == "| b | 25.00 (4.6–69.9) | 66.67 | – |"


def test_discordant_pairs_by_hand(tmp_path: Path) -> None:
    found = compared(tmp_path, {"a": science("rrrrrwww"), "b": science("rrwwrrrr")})
    [test] = found.tests
    assert (test.first, test.other, test.questions, test.only_first, test.only_other) == ("a", "b", 8, 2, 3)
    assert (test.p, test.holm, test.difference) == (1.0, 1.0, 12.5)


@pytest.mark.parametrize(("first", "other", "p"), [(0, 0, 1.0), (0, 1, 1.0), (0, 6, 2 / 64), (1, 7, 18 / 256)])
def test_mcnemar_by_hand(first: int, other: int, p: float) -> None:
    assert mcnemar(first, other) == pytest.approx(p, abs=1e-15)


@given(first=st.integers(0, 60), other=st.integers(0, 60))
def test_mcnemar_is_the_tail_of_a_fair_coin(first: int, other: int) -> None:
    total = first + other
    tail = sum(math.comb(total, k) for k in range(min(first, other) + 1)) / 2**total
    assert mcnemar(first, other) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(first, other) == mcnemar(other, first)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert (holm([0.2]), holm([])) == ([0.2], [])


@given(values=st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(values: list[float]) -> None:
    corrected = holm(values)
    for p, adjusted in zip(values, corrected, strict=True):
        assert p <= adjusted <= min(1.0, len(values) * p)
    ordered = [adjusted for _, adjusted in sorted(zip(values, corrected, strict=True))]
    assert ordered == sorted(ordered)


def test_seeds_of_one_recipe_are_averaged_and_paired_seed_by_seed(tmp_path: Path) -> None:
    recipes = {name: recipe_of(int(name[-1]), int(name[1:3])) for name in SEEDS}
    found = compared(tmp_path, {name: science(marks) for name, marks in SEEDS.items()}, recipes)
    first, other = found.groups
    assert [(group.name, group.settings) for group in found.groups] == [
        ("r16", {"lora.r": 16}),
        ("r32", {"lora.r": 32}),
    ]
    assert first.columns["AVG"] == [50.0, 75.0]
    assert first.mean("AVG") == 62.5
    assert first.deviation("AVG") == pytest.approx(statistics.stdev([50.0, 75.0]))
    assert (first.interval(), other.deviation("AVG")) == (None, 0.0)
    assert [(t.seeds, t.only_first, t.only_other, t.p, t.holm) for t in found.tests] == [
        ((0, 0), 0, 2, 0.5, 1.0),
        ((1, 1), 0, 1, 1.0, 1.0),
    ]
    assert found.notes == []


def test_seeds_without_a_pair_are_reported(tmp_path: Path) -> None:
    runs = {name: science("rw") for name in ("a-1", "a-2", "b-2", "b-3", "c-7", "c-8")}
    recipes = {name: recipe_of(int(name[-1]), ord(name[0])) for name in runs}
    found = compared(tmp_path, runs, recipes)
    assert [group.name for group in found.groups] == ["a", "b", "c"]
    assert [(test.other, test.seeds) for test in found.tests] == [("b", (2, 2))]
    assert found.notes == [
        "b against a: no test of a-1, b-3, the seed is not in both groups",
        "no test of c against a: they share no seed",
    ]


def test_irrelevant_recipe_keys_do_not_split_a_group(tmp_path: Path) -> None:
    runs = {"a-1": science("rw"), "a-2": science("rr")}
    recipes = {name: recipe_of(int(name[-1])) | {"evaluation": {"generate_every": int(name[-1])}} for name in runs}
    assert [group.name for group in compared(tmp_path, runs, recipes).groups] == ["a"]


def test_a_single_run_without_a_shared_seed_is_paired_with_every_seed(tmp_path: Path) -> None:
    runs = {"before": science("ww"), "a-1": science("rw"), "a-2": science("rr")}
    found = compared(tmp_path, runs, {"a-1": recipe_of(1), "a-2": recipe_of(2)})
    assert [(test.other, test.seeds, test.only_other) for test in found.tests] == [
        ("a", (None, 1), 1),
        ("a", (None, 2), 2),
    ]
    assert [group.settings for group in found.groups] == [{}, {}]


def test_a_repeated_seed_is_not_averaged(tmp_path: Path) -> None:
    runs = {name: science("rw") for name in ("a-1", "a-2", "merged")}
    found = compared(tmp_path, runs, {"a-1": recipe_of(1), "a-2": recipe_of(2), "merged": recipe_of(1)})
    assert [(group.name, len(group.runs)) for group in found.groups] == [("a", 2), ("merged", 1)]
    assert found.notes[0] == "merged has the same recipe and seed as a-1, so it is a group of its own"


def on_stage1(seed: int, stage1: str, r: int = 16) -> dict[str, Any]:
    return recipe_of(seed, r, model={"start_from": {"stage1_run": stage1, "stage1_recipe": None}})


def test_seeds_from_different_stage_1_runs_are_averaged_with_a_note(tmp_path: Path) -> None:
    recipes = {"a-1": on_stage1(1, "s1/x"), "a-2": on_stage1(2, "s1/y"), "b-1": on_stage1(1, "s1/x", r=32)}
    found = compared(tmp_path, {"a-1": science("rw"), "a-2": science("rr"), "b-1": science("ww")}, recipes)
    assert [(group.name, len(group.runs), group.mean("AVG")) for group in found.groups] == [
        ("a", 2, 75.0),
        ("b-1", 1, 0.0),
    ]
    assert found.groups[0].settings == {"lora.r": 16}
    assert found.notes[0] == "a: the runs start from different Stage 1 runs: s1/x, s1/y"
    assert "- a: the runs start from different Stage 1 runs: s1/x, s1/y" in render(found, "markdown")


def test_compared_stage_1_runs_are_separate_groups(tmp_path: Path) -> None:
    names = {"a-1": "s1/x-1", "a-2": "s1/x-2", "b-1": "s1/y", "b-2": "s1/y"}
    recipes = {name: on_stage1(int(name[-1]), stage1) for name, stage1 in names.items()}
    found = compared(tmp_path, {name: science("rw") for name in names}, recipes)
    assert [(group.name, group.settings.get("model.start_from.stage1_run")) for group in found.groups] == [
        ("a", None),
        ("b", "s1/y"),
    ]
    assert found.notes == ["a: the runs start from different Stage 1 runs: s1/x-1, s1/x-2"]
    twins = compared(tmp_path, {"a": science("r"), "b": science("r")}, {n: on_stage1(1, "s1/x") for n in "ab"})
    assert twins.notes == ["b has the same recipe and seed as a, so it is a group of its own"]


def test_a_digit_without_a_separator_is_not_a_seed(tmp_path: Path) -> None:
    runs = {name: science("rw") for name in ("r31", "r32")}
    found = compared(tmp_path, runs, {"r31": recipe_of(1), "r32": recipe_of(2)})
    assert [group.name for group in found.groups] == ["r31, r32"]


def test_keys_in_which_groups_differ() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None, "f": {}}) == {"a.b": 1, "a.c.d": [2], "e": None, "f": {}}


def test_missing_questions_are_named_and_common_leaves_them_out(tmp_path: Path) -> None:
    runs = {"a": science("rrrrrr"), "b": science("rrrrrr", first=4)}
    with pytest.raises(UserError) as error:
        compared(tmp_path, runs)
    lines = str(error.value).splitlines()
    advice = "evaluate the run on the same questions, or compare the common ones with --common"
    assert [
        line.partition("b/predictions.jsonl: ")[2] or line.partition("a/predictions.jsonl: ")[2] for line in lines
    ] == [
        f"no answer to 4 of 10 questions: 6, 7, 8, …; {advice}",
        f"no answer to 4 of 10 questions: 0, 1, 2, …; {advice}",
    ]
    found = compared(tmp_path, runs, common=True)
    assert [len(group.runs[0].rows) for group in found.groups] == [2, 2]
    assert found.questions == [2]
    assert found.notes == ["8 of 10 questions left out: missing from a run, or repeated in one"]
    with pytest.raises(UserError, match="no question is in every run exactly once"):
        compared(tmp_path, {"a": science("r"), "b": science("r", first=4)}, common=True)


def test_questions_answered_twice_are_named(tmp_path: Path) -> None:
    twice = [*science("rrrr"), *science("w")]
    runs = {"a": science("rrrr"), "b": twice}
    with pytest.raises(UserError, match="1 of 4 questions answered more than once: 0; keep one answer, or leave"):
        compared(tmp_path, runs)
    assert compared(tmp_path, runs, common=True).questions == [3]


def test_repeated_ids_are_distinguished_by_question_reference_and_source(tmp_path: Path) -> None:
    rows = [score_answer("7", "mine", *asked) for asked in (("Q?", "A", "A"), ("Q?", "B", "A"), ("R?", "A", "A"))]
    [test] = compared(tmp_path, {"a": rows, "b": rows[::-1]}).tests
    assert (test.questions, test.only_first, test.only_other) == (3, 0, 0)
    two = [score_answer("7", source, "Q?", "A", text) for source, text in (("one", "A"), ("two", "B"))]
    found = compared(tmp_path, {"a": two, "b": two[::-1]})
    assert [(test.questions, test.only_first, test.only_other) for test in found.tests] == [(2, 0, 0)]
    assert found.notes == []
    renamed = [score_answer("7", "renamed", "Q?", "A", "B")]  # of one source alone the name tells nothing
    [test] = compared(tmp_path, {"a": two[:1], "b": renamed}).tests
    assert (test.questions, test.only_first, test.only_other) == (1, 1, 0)


def test_copies_of_one_row_are_paired_in_their_order(tmp_path: Path) -> None:
    first = [score_answer("7", "mine", "Q?", "A", text) for text in ("A", "A", "B")]
    other = [score_answer("7", "mine", "Q?", "A", text) for text in ("A", "B", "B")]
    found = compared(tmp_path, {"a": [*own("x"), *first], "b": [*other, *own("x")]})
    [test] = found.tests
    assert (test.questions, test.only_first, test.only_other) == (4, 1, 0)
    assert found.notes == ["1 row appears more than once in the data (7); copies are paired in order"]
    runs = {"a": [*own("x"), *first], "b": [*other[:2], *own("x")]}
    with pytest.raises(UserError, match=r"b/predictions.jsonl: no answer to 1 of 4 questions: 7;"):
        compared(tmp_path, runs)
    found = compared(tmp_path, runs, common=True)  # which of three is missing cannot be determined
    assert (found.questions, found.notes) == (
        [1],
        ["3 of 4 questions left out: missing from a run, or repeated in one"],
    )


def test_seeds_may_have_different_questions(tmp_path: Path) -> None:
    runs = {"a-1": own("x", "x"), "b-1": own("red cube", "x"), "a-2": own("x", first=9), "b-2": own("x", first=9)}
    recipes = {name: recipe_of(int(name[-1]), ord(name[0])) for name in runs}
    found = compared(tmp_path, runs, recipes)
    assert found.notes == ["each seed has its own questions; runs of one seed have the same questions"]
    assert [(test.seeds, test.questions, test.only_other) for test in found.tests] == [((1, 1), 2, 1), ((2, 2), 1, 0)]
    assert render(found, "terminal").startswith("Answers, 1 to 2 questions\n")
    with pytest.raises(UserError, match="no answer to"):  # b lacks seed 2: its mean would be of other questions
        compared(
            tmp_path, {name: runs[name] for name in ("a-1", "a-2", "b-1")}, {n: recipes[n] for n in runs if n != "b-2"}
        )


def test_an_id_with_two_right_answers_is_refused(tmp_path: Path) -> None:
    other = science("rw")
    other[1]["answer"] = 3
    with pytest.raises(UserError, match=r"the right answer to question 1 is 3, in .*a/predictions.jsonl it is 1"):
        compared(tmp_path, {"a": science("rw"), "b": other})


def test_the_newer_predictions_file_counts(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", science("ww"), name="predictions_after")
    assert read_runs([folder], {})[0].file.name == "predictions_after.jsonl"
    written(folder, science("rr"))
    os.utime(folder / "predictions_after.jsonl", (1, 1))
    assert read_runs([folder], {})[0].file.name == "predictions.jsonl"
    os.utime(folder / "predictions.jsonl", (0, 0))
    assert read_runs([folder], {})[0].file.name == "predictions_after.jsonl"
    files = [folder / "predictions.jsonl", folder / "predictions_after.jsonl"]
    assert [run.name for run in read_runs(files, {})] == ["a/predictions.jsonl", "a/predictions_after.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1: list, not an object"),
        ('{"question_id": "1", "text": "B"}', "line 1: no prediction;"),
        (json.dumps({**science("r")[0], "question_id": 7}), "line 1: question_id is 7;"),
        (json.dumps({**science("r")[0], "answer": True}), "line 1: answer is True;"),
        (json.dumps({**science("r")[0], "categories": ["ART"]}), r"line 1: categories is \['ART'\];"),
        (json.dumps({**own("x")[0], "f1": math.nan}), "line 1: f1 is nan;"),
        (json.dumps({**own("x")[0], "exact": 1}), "line 1: exact is 1;"),
        (json.dumps({**own("x")[0], "source": ["a"]}), r"line 1: source is \['a'\];"),
        (json.dumps(science("r")[0]) + "\n\n" + json.dumps(own("x")[0]), "line 3: no prediction;"),
        ("\n", "is empty; run"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(line)
    with pytest.raises(UserError, match=message):
        read_runs([file], {})


def test_paths_that_cannot_be_compared(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a", science("r")), written(tmp_path / "b", own("x"))
    (tmp_path / "empty").mkdir()
    for paths, message in (
        ([tmp_path / "none"], "none does not exist; name a run directory or a predictions file"),
        ([tmp_path / "empty"], "empty has no predictions.jsonl or predictions_after.jsonl; run `lora-llava evaluate"),
        ([a, tmp_path / "b" / ".." / "a"], "is named twice"),
        (
            [a, b],
            "b/predictions.jsonl has answers to conversations, .*a/predictions.jsonl to scienceqa; compare runs of one",
        ),
    ):
        with pytest.raises(UserError, match=message):
            read_runs(paths, {})
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="is not UTF-8"):
        read_runs([tmp_path / "latin.jsonl"], {})
