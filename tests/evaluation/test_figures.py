"""Figures beside a score: majority answers, gains beyond chance, confusion, and their sentences."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from scipy.stats import binomtest

from lora_llava.data.conversation import Conversation, Turn
from lora_llava.evaluation.answers import answer_table, score_answer
from lora_llava.evaluation.figures.confusion import OTHER, confusions, read_confusion
from lora_llava.evaluation.figures.figure_lines import figure_lines, line_notes, matrix, read_confusions
from lora_llava.evaluation.figures.majority import count_answers, count_row_answers, majority_rows, read_majority
from lora_llava.evaluation.figures.run_figures import ShuffledImages, build_figures, paired
from lora_llava.evaluation.figures.significance import describe_gain, measure_gain, rows_needed
from lora_llava.evaluation.tables import tables_view

ASK = "Is it ok?"


def conversation(number: int, answer: str, question: str = ASK, kind: str | None = None) -> Conversation:
    extra = {"type": kind} if kind else {}
    turns = (Turn("user", f"<image>\n{question}"), Turn("assistant", answer))
    return Conversation(str(number), turns, (f"{number}.png",), extra)


def answered(rows: list[Conversation], texts: list[str]) -> list[Any]:
    """The lines of a predictions file."""
    return [
        score_answer(row.row_id, "", row.turns[0].words, row.turns[1].shown, text, row.extra.get("type"))
        for row, text in zip(rows, texts, strict=True)
    ]


def held_out(answers: list[str], **about: Any) -> list[Conversation]:
    return [conversation(number, answer, **about) for number, answer in enumerate(answers)]


def trained(answers: list[str], **about: Any) -> Any:
    found = count_row_answers(held_out(answers, **about))
    assert found is not None
    return found


# --- the majority answer -------------------------------------------------------------------------------------------


def test_answers_that_exact_match_does_not_distinguish_are_one() -> None:
    counts = trained(["Yes.", "yes", "yes", "YES", "no", "no"])
    assert counts.all.answers == (("yes", 4), ("no", 2))
    assert (counts.all.majority, counts.all.distinct, counts.all.rows) == ("yes", 2, 6)


def test_of_equally_frequent_answers_the_first_in_the_data_counts() -> None:
    assert trained(["b", "a", "a", "b"]).all.majority == "b"
    assert trained(["a", "b", "b", "a"]).all.majority == "a"


def test_unicode_answers_are_counted_by_what_exact_match_compares() -> None:
    counts = trained(["Öl", "öl.", "O\u0308l", "裂纹", "裂 纹", "٣", "3"])
    assert [count for _, count in counts.all.answers] == [3, 2, 2]
    assert counts.all.majority in ("Öl", "O\u0308l")


def test_rows_belong_to_their_type_then_to_their_question_then_to_all() -> None:
    rows: list[tuple[str | None, str, str]] = [("colour", f"Which is {n}?", "red") for n in range(3)]
    rows += [(None, "How many?", "2") for _ in range(5)]
    rows += [(" ", "Seldom asked?", "no"), ("", "Why?", "2")]
    counts = count_answers(rows)
    assert counts is not None
    assert {name: group.majority for name, group in counts.types.items()} == {"colour": "red"}
    assert [group.name for group in counts.questions.values()] == ["How many?"]
    assert counts.all.majority == "2"
    assert counts.group("colour", "Another?").majority == "red"
    assert counts.group(None, "how many").by == "question"
    assert counts.group("unknown", "Seldom asked?").by == counts.group("", "Seldom asked?").by == "all"
    assert [group.title for group in counts.groups] == ["How many?", "type: colour"]
    assert read_majority(counts.as_dict()) == counts


def test_few_answers_are_at_most_20_with_five_rows_each() -> None:
    assert trained([str(n % 20) for n in range(100)]).all.few
    assert not trained([str(n % 20) for n in range(99)]).all.few
    assert not trained([str(n % 21) for n in range(210)]).all.few


def test_no_rows_have_no_majority() -> None:
    assert count_answers([]) is None


def test_the_majority_answer_is_scored_as_a_model_s() -> None:
    rows = held_out(["OK", "scratch", "ok."])
    lines = answered(rows, ["", "", ""])
    found = majority_rows(trained(["ok"] * 5 + ["scratch"]), lines, [None] * 3)
    assert [line["exact"] for line in found] == [True, False, True]
    assert answer_table(found)["all"]["exact_match"] == 66.67
    assert answer_table(found)["all"]["loss"] is None


# --- gains ---------------------------------------------------------------------------------------------------------


def gain(gained: int, lost: int, both: int = 0, none: int = 0) -> Any:
    first = [True] * gained + [False] * lost + [True] * both + [False] * none
    second = [False] * gained + [True] * lost + [True] * both + [False] * none
    return measure_gain("after", "majority", first, second)


@pytest.mark.parametrize(("gained", "lost"), [(6, 0), (5, 0), (20, 8), (3, 9), (0, 0), (4, 4)])
def test_p_is_scipy_s_exact_binomial(gained: int, lost: int) -> None:
    found = gain(gained, lost, both=10, none=3)
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert found.p == pytest.approx(expected)
    assert found.as_dict()["beyond_chance"] is bool(gained > lost and expected < 0.05)


def test_six_gained_and_none_lost_is_beyond_chance_and_five_is_not() -> None:
    six, five = gain(6, 0, none=14), gain(5, 0, none=15)
    assert (six.p, six.needed) == (0.03125, None)
    assert describe_gain(six, "After training", "the majority answer") == (
        "After training, 30.00% of 20 held-out rows are right, compared with 0.00% for the majority answer: the gain "
        "of 30 points is beyond chance (McNemar's exact test, p = 0.031)."
    )
    assert (five.p, five.needed) == (0.0625, 9)
    assert describe_gain(five, "After training", "the majority answer") == (
        "After training, 25.00% of 20 held-out rows are right, compared with 0.00% for the majority answer: the gain "
        "of 25 points may be chance (McNemar's exact test, p = 0.06); about 9 more held-out rows would show "
        "a gain of this size in 4 of 5 cases."
    )


def test_a_loss_and_no_difference_are_named() -> None:
    assert describe_gain(gain(2, 5, both=3), "After training", "it").endswith(
        "50.00% of 10 held-out rows are right, compared with 80.00% for it: no gain, and the loss of 30 "
        "points may be chance (McNemar's exact test, p = 0.45)."
    )
    assert "the loss of 60 points is beyond chance" in describe_gain(gain(0, 6, both=4), "A", "it")
    assert describe_gain(gain(3, 3, both=4), "A", "it").endswith("compared with 70.00% for it: no gain.")
    assert gain(2, 5).needed is None


def test_rows_needed_are_connor_s() -> None:
    # 0.3 of the rows gained and 0.2 lost: (1.96 sqrt(0.5) + 0.8416 sqrt(0.5 - 0.01))^2 / 0.01
    assert rows_needed(10, 3, 2) == 391
    assert gain(3, 2, none=5).needed == 381
    assert "about 390 more held-out rows" in describe_gain(gain(3, 2, none=5), "A", "it")
    assert "more than 100,000 further held-out rows" in describe_gain(gain(501, 500), "A", "it")


def test_a_gain_needs_rows() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        measure_gain("after", "before", [], [])


def test_rows_are_paired_by_what_was_asked() -> None:
    rows = held_out(["yes", "no", "yes"])
    first, second = answered(rows, ["yes", "yes", "yes"]), answered(rows, ["no", "no", "yes"])
    assert paired(first, second[::-1]) == [(True, False), (False, True), (True, True)]
    assert paired(first, second[1:]) == [(False, True), (True, True)]
    other = [replace(rows[0], row_id="elsewhere")]
    assert paired(first, answered(other, ["yes"])) == []


# --- confusion -----------------------------------------------------------------------------------------------------


def test_a_confusion_table_by_hand() -> None:
    rows = held_out(["ok"] * 6 + ["Scratch", "scratch", "scratch."])
    texts = ["OK", "ok", "ok", "ok", "scratch", "a long story", "scratch", "ok", "Scratch!"]
    [found] = confusions(answered(rows, texts), [None] * 9)
    assert found.answers == ("ok", "Scratch")
    assert found.counts == ((4, 1, 1), (1, 2, 0))
    assert (found.rows, found.right, found.balanced_accuracy) == (9, 6, 66.67)
    assert found.instead(0) == [("scratch".capitalize(), 1), (OTHER, 1)]
    saved = found.as_dict()
    assert saved["classes"]["ok"]["recall"] == 66.67
    assert saved["classes"]["ok"]["recall_interval"] == [30.0, 90.32]
    assert read_confusion(saved) == found
    assert matrix(found) == (
        ["reference", "ok", "Scratch", OTHER, "rows", "recall in %"],
        [["ok", "4", "1", "1", "6", "66.67"], ["Scratch", "1", "2", "0", "3", "66.67"]],
    )


def test_balanced_accuracy_shows_what_accuracy_hides() -> None:
    [found] = confusions(answered(held_out(["ok"] * 95 + ["scratch"] * 5), ["ok"] * 100), [None] * 100)
    assert (100 * found.right / found.rows, found.balanced_accuracy) == (95.0, 50.0)


def test_an_image_that_cannot_be_opened_is_any_other_answer() -> None:
    lines = answered(held_out(["ok"] * 3), ["ok", "ok", "ok"])
    [found] = confusions([*lines[:2], lines[2] | {"problem": "broken", "exact": False}], [None] * 3)
    assert found.counts == ((2, 1),)


def test_tables_are_by_type_or_by_question_and_only_of_few_answers() -> None:
    typed = [*held_out(["red", "blue"] * 3, kind="colour"), *held_out([f"text {n}" for n in range(9)], kind="why")]
    found = confusions(answered(typed, ["red"] * 15), [row.extra["type"] for row in typed])
    assert [each.group for each in found] == ["type: colour"]
    asked = [*held_out(["red", "blue"] * 3, question="Colour?"), *held_out(["1", "2"] * 3, question="How many?")]
    assert [each.group for each in confusions(answered(asked, ["red"] * 12), [None] * 12)] == ["Colour?", "How many?"]
    many = [conversation(n, "yes" if n % 2 else "no", f"Is it {n}?") for n in range(30)]
    assert [each.answers for each in confusions(answered(many, ["yes"] * 30), [None] * 30)] == [("no", "yes")]
    assert confusions([], []) == []


# --- together ------------------------------------------------------------------------------------------------------


def figures_of(references: list[str], after: list[str], training: list[str], **more: Any) -> dict[str, Any]:
    rows = held_out(references)
    before = answered(rows, ["a rambling answer"] * len(rows))
    return build_figures({"before": before, "after": answered(rows, after)}, rows, trained(training), **more)


def test_a_set_where_the_majority_wins() -> None:
    found = figures_of(["ok"] * 11 + ["bad"] * 9, ["ok"] * 8 + ["bad"] * 12, ["ok"] * 60 + ["bad"] * 40)
    assert found["majority"]["table"]["all"]["exact_match"] == 55.0
    assert found["intervals"]["majority"]["all"] == [34.21, 74.18]
    majority, before = found["gains"]
    assert (majority["right"], majority["right_before"], majority["gained"], majority["lost"]) == (17, 11, 9, 3)
    assert (majority["beyond_chance"], before["beyond_chance"]) == (False, True)
    worse = figures_of(["ok"] * 11 + ["bad"] * 9, ["bad"] * 20, ["ok"] * 60 + ["bad"] * 40)
    assert worse["sentences"][0] == (
        "After training, 45.00% of 20 held-out rows are right, compared with 55.00% for the majority answer of the "
        "training rows: no gain, and the loss of 10 points may be chance (McNemar's exact test, p = 0.82)."
    )
    assert worse["balanced_accuracy"] == {"": {"majority": 50.0, "before": 0.0, "after": 50.0}}


def test_a_set_where_the_model_is_better_than_the_majority_beyond_chance() -> None:
    found = figures_of(["ok", "bad"] * 20, ["ok", "bad"] * 20, ["ok"] * 6 + ["bad"] * 5)
    assert found["sentences"][0] == (
        "After training, 100.00% of 40 held-out rows are right, compared with 50.00% for the majority answer of the "
        "training rows: the gain of 50 points is beyond chance (McNemar's exact test, p < 0.001)."
    )
    assert [gain["over"] for gain in found["gains"]] == ["majority", "before"]


def test_types_without_a_gain_over_the_majority_are_named() -> None:
    rows = [*held_out(["red", "blue"] * 5, kind="colour"), *held_out(["yes"] * 7 + ["no"] * 3, kind="presence")]
    lines = answered(rows, ["red", "blue"] * 5 + ["yes"] * 10)
    found = build_figures({"after": lines}, rows, count_row_answers(rows))
    assert found["gains"][0]["beyond_chance"] is False
    assert found["sentences"][1] == (
        "No gain over the majority answer in type: presence (70.00% of 10 rows, majority answer 70.00%)."
    )


def test_answers_that_are_never_right_are_named() -> None:
    references = ["a"] * 6 + ["b"] * 5 + ["c"] * 4
    found = figures_of(references, ["a"] * 6 + ["c"] * 9, ["a", "b", "c"] * 5)
    assert "No row is right where the answer is 'b' (5 rows)." in found["sentences"]
    enough = figures_of(references, ["a"] * 11 + ["a"] * 4, ["a", "b", "c"] * 5)  # 4 rows of c are too few to say so
    assert "No row is right where the answer is 'b' (5 rows)." in enough["sentences"]
    none_right = figures_of(references, ["x"] * 15, ["a", "b", "c"] * 5)
    assert not [sentence for sentence in none_right["sentences"] if sentence.startswith("No row is right")]


def test_one_answer_only() -> None:
    found = figures_of(["ok"] * 12, ["ok"] * 12, ["OK."] * 30)
    assert found["sentences"][0].endswith("the training rows: no gain.")
    assert found["sentences"][-1] == (
        "All 12 held-out rows have the answer 'ok': these scores do not show whether the model can distinguish answers."
    )
    assert read_confusions(found)[0].counts == ((12, 0),)


def test_free_texts_have_no_majority_answer() -> None:
    texts = [f"a text about {n}" for n in range(30)]
    found = figures_of(texts[:9], texts[:9], texts)
    assert found["majority"]["table"] is None
    assert found["confusion"] == []
    assert found["sentences"][-1] == (
        "No answer occurs twice in the training rows, so there is no majority answer to compare with."
    )


def test_the_better_of_two_scores_before_training_is_compared() -> None:
    rows = held_out(["ok", "bad"] * 10)
    before, weighed = answered(rows, ["Well, well"] * 20), answered(rows, ["ok"] * 20)
    answers = {"before": before, "before_by_likelihood": weighed, "after": answered(rows, ["ok", "bad"] * 10)}
    found = build_figures(answers, rows, trained(["ok", "bad"]))
    assert found["before_by_likelihood"]["all"]["exact_match"] == 50.0
    assert [(gain["over"], gain["right_before"]) for gain in found["gains"]] == [("before_by_likelihood", 10)]
    assert "compared with 50.00% for the model before training, by likelihood:" in found["sentences"][0]


@pytest.mark.parametrize(
    ("texts", "start"),
    [
        (["bad", "ok"] * 10, "The model uses the images: with the images of other rows, 0.00% of 20 held-out rows"),
        (["ok", "bad"] * 10, "These rows do not show that the model uses the images: with the images of other rows,"),
    ],
)
def test_shuffled_images(texts: list[str], start: str) -> None:
    rows = held_out(["ok", "bad"] * 10)
    shuffled = ShuffledImages(0.25, range(20), answered(rows, texts))
    found = figures_of(["ok", "bad"] * 10, ["ok", "bad"] * 10, ["ok", "ok"], shuffled=shuffled)
    assert (found["shuffled"]["rows"], found["shuffled"]["of"], found["shuffled"]["share"]) == (20, 20, 0.25)
    assert found["shuffled"]["own_images"]["all"]["exact_match"] == 100.0
    assert [sentence for sentence in found["sentences"] if sentence.startswith(start)]


def test_images_that_cannot_be_shuffled_and_shared_images_are_named() -> None:
    rows = [replace(row, images=("one.png",)) for row in held_out(["ok", "bad"] * 5)]
    found = build_figures(
        {"after": answered(rows, ["ok"] * 10)}, rows, trained(["ok"] * 3), ShuffledImages(0.25, [], [])
    )
    assert found["sentences"][-2:] == [
        "Images could not be shuffled: too few held-out rows have different images.",
        "10 held-out rows share 1 image; rows of one image are not independent, so the intervals are too narrow and "
        "the p values too small.",
    ]


def test_the_terminal_shows_every_line_within_80_columns() -> None:
    rows = held_out(["ok", "bad"] * 10)
    shuffled = ShuffledImages(0.25, range(8), answered(rows[:8], ["ok"] * 8))
    found = figures_of(["ok", "bad"] * 10, ["ok", "bad"] * 10, ["ok", "bad", "[red]"] * 20, shuffled=shuffled)
    tables = {name: answer_table(answered(rows, ["ok", "bad"] * 10)) for name in ("before", "after")}
    assert [line.title for line in figure_lines(tables, found)] == [
        "majority answer",
        "before",
        "after",
        "images shuffled",
    ]
    stream = io.StringIO()
    Console(file=stream, width=80).print(tables_view("Answers", tables, found))
    shown = stream.getvalue()
    line = ["majority", "answer", "50.00", "29.9–70.1", "50.00", "50.00", "20"]
    assert line in [each.split() for each in shown.splitlines()]
    assert line_notes(found)[0] in " ".join(shown.split())
    assert ["bad", "0", "10", "10", "100.00"] in [each.split() for each in shown.splitlines()]
    assert "…" not in shown
    assert [line.title for line in figure_lines(tables)] == ["before", "after"]  # a run of an earlier version
