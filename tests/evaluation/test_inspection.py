"""The parts of `lora-llava inspect`: groups of few answers, leave-one-out predictions, near-duplicates, the page."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lora_llava.data.conversation import Conversation, Turn
from lora_llava.evaluation.inspection import near_duplicates, surprise
from lora_llava.evaluation.inspection.inspected_rows import InspectedRow, by_image, without_images
from lora_llava.evaluation.inspection.near_duplicates import NearGroup, find_near_duplicates
from lora_llava.evaluation.inspection.row_measures import average_patches
from lora_llava.evaluation.inspection.surprise import BY_MODEL, BY_ROWS, few_answer_groups, find_surprises
from lora_llava.pages.inspect_page import InspectItem, InspectList, InspectPage, render_inspect_page


def row(question: str, answer: str) -> Conversation:
    return Conversation("0", (Turn("user", f"<image>\n{question}"), Turn("assistant", answer)), ("a",))


def test_leave_one_out_equals_a_fit_without_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surprise, "_PENALTIES", (1e-2,))
    rng = np.random.default_rng(0)
    states, given = rng.normal(size=(30, 7)), rng.integers(-1, 3, 30)
    inputs = (states - states.mean(0)) / (states.std(0) + 1e-6) / 7**0.5
    inputs, targets = np.c_[inputs, np.ones(30)], np.eye(4)[given][:, :3]
    together = [[3, 8, 9], [20, 21]]
    for groups in ([], together):
        expected = []
        for left in range(30):
            out = next((group for group in groups if left in group), [left])
            kept = ~np.isin(np.arange(30), out)
            gram = inputs[kept].T @ inputs[kept] + 0.3 * np.eye(8)
            expected.append(inputs[left] @ np.linalg.solve(gram, inputs[kept].T @ targets[kept]))
        np.testing.assert_allclose(surprise.leave_out(states, given, 3, groups), expected, atol=1e-9)


def test_of_two_answers_to_one_question_about_one_image_the_wrong_one_is_surprising() -> None:
    rng = np.random.default_rng(3)
    given = np.arange(60) % 2
    states = np.eye(2)[given] @ rng.normal(size=(2, 16)) + 0.3 * rng.normal(size=(60, 16))
    states[31] = states[0]  # the same image and question, and another answer
    names = ["yes", "no"]
    images = ["0" if n == 31 else str(n) for n in range(60)]
    rows = [replace(row("Is it?", names[given[n]]), images=(images[n],)) for n in range(60)]
    found = find_surprises(rows, states.astype(np.float16), np.zeros(60))
    assert [n for n in range(60) if found[n].is_surprising] == [31]  # type: ignore[union-attr]


def test_questions_that_share_answers_are_one_group_and_free_answers_none() -> None:
    colours = [
        row(f"What colour is the {'box' if n % 2 else 'bag'}?", ("Red", "red.", "blue")[n % 3]) for n in range(24)
    ]
    free = [row("Describe it.", f"A scene with {n} unlike things and {n * 7} others.") for n in range(24)]
    few = [row("How many?", "two") for _ in range(19)]
    several = [Conversation("x", (*colours[0].turns, *colours[0].turns), ("a", "a"))] * 3
    rows = [*colours, *free, *few, *several]
    assert few_answer_groups(rows, range(len(rows))) == [list(range(24))]


def test_exchanged_answers_come_first() -> None:
    rng = np.random.default_rng(1)
    given = np.arange(200) % 4
    states = np.eye(4)[given] @ rng.normal(size=(4, 16)) + 0.4 * rng.normal(size=(200, 16))
    wrong = [3, 40, 77, 101, 138, 160, 175, 199]
    named = np.array(["red", "blue", "green", "black"])
    answers = named[given]
    answers[wrong] = named[(given[wrong] + 1) % 4]
    rows = [row("What colour?", str(answer)) for answer in answers]
    found = find_surprises(rows, states.astype(np.float16), np.zeros(200))
    order = sorted(range(200), key=lambda i: -found[i].score)  # type: ignore[union-attr]
    assert sorted(order[:8]) == wrong
    assert [found[i].likelier for i in wrong] == named[given[wrong]].tolist()  # type: ignore[union-attr]
    assert all(found[i].is_surprising and found[i].rank > 1 and found[i].by == BY_ROWS for i in wrong)  # type: ignore[union-attr]


def test_an_answer_that_no_other_row_has_and_a_free_answer_with_an_outlier_s_loss_are_surprising() -> None:
    states = np.eye(2)[np.arange(40) % 2]
    rows = [row("What colour?", ("red", "blue")[n % 2]) for n in range(40)]
    rows[5] = row("What colour?", "bleu")
    rows += [row(f"Describe {n}.", f"Words {n} of many kinds {n * n}.") for n in range(20)]
    excess = np.concatenate([np.zeros(40), np.linspace(-0.1, 0.1, 20)])
    excess[50], excess[51] = 3.0, np.nan
    found = find_surprises(rows, np.r_[states, np.zeros((20, 2))], excess)
    assert [i for i, each in enumerate(found) if each is not None and each.is_surprising] == [5, 50]
    assert found[5] is not None
    assert found[5].likelier == "blue"
    assert found[50] is not None
    assert (found[50].by, found[50].rank) == (BY_MODEL, 0)
    assert found[51] is None


def test_answers_that_other_rows_cannot_predict_are_compared_with_the_model() -> None:
    states = np.random.default_rng(3).normal(size=(60, 8))
    rows = [row("What colour?", ("red", "blue", "green")[n % 3]) for n in range(60)]
    found = find_surprises(rows, states, np.r_[np.linspace(-0.1, 0.1, 59), 4.0])
    assert {each.by for each in found if each is not None} == {BY_MODEL}
    assert [i for i, each in enumerate(found) if each is not None and each.is_surprising] == [59]


def test_choices_are_the_answers_of_scienceqa() -> None:
    choices = [{"choices": ["yes", "no"], "answer": n % 2} for n in range(20)]
    rows = [replace(row(f"Is it {n}?", "Because. The answer is A."), extra=extra) for n, extra in enumerate(choices)]
    assert few_answer_groups(rows, range(20)) == [list(range(20))]
    assert surprise.given_answer(rows[1]) == "no"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nWhat?", "What?"),
        ("What?\n<image>", "What?"),
        ("One\n<image>\nand\n<image>\ntwo", "One\nand\ntwo"),
        ("Is <image> it?", "Is  it?"),
        ("A\n\nB", "A\n\nB"),
        ("<image>", ""),
    ],
)
def test_a_row_without_its_image_is_written_as_text(text: str, expected: str) -> None:
    found = without_images(Conversation("0", (Turn("user", text), Turn("assistant", "x")), ("a",)))
    assert (found.turns[0].text, found.images) == (expected, ())


def test_parts_keep_rows_of_an_image_together_and_splits_apart() -> None:
    rows = [
        InspectedRow(split, Conversation(f"{n}", (), (f"{n % 10}.png",)))
        for split in ("train", "test")
        for n in range(40)
    ]
    parts = by_image(rows, 16, 0)
    assert sorted(i for part in parts for i in part) == list(range(80))
    assert [len(part) for part in parts] == [20, 20, 20, 20]
    assert all(len({rows[i].split for i in part}) == 1 for part in parts)
    assert all(len({rows[i].row.images for i in part}) == 5 for part in parts)


def test_near_duplicates_are_found_after_the_mean_is_taken_off() -> None:
    rng = np.random.default_rng(2)
    images = list(100 + rng.normal(size=(9, 20)))
    images.append(images[4] + 0.01 * rng.normal(size=20))
    (found,) = find_near_duplicates(images)
    assert found.places == [4, 9]
    assert min(found.cosines) > 0.999
    assert find_near_duplicates(images[:1]) == []
    assert find_near_duplicates([images[0], images[0]]) == [NearGroup([0, 1], [1, 0], [pytest.approx(1.0)] * 2)]


def test_near_duplicates_of_near_duplicates_are_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_BLOCK", 2)
    angles = np.array([0.0, 90.0, 36.0, 12.0, 24.0, 94.0, 200.0])  # degrees; the cosine of 12 is 0.978, of 24 0.914
    images = [np.array([np.cos(angle), np.sin(angle)]) for angle in np.radians(angles)]
    found = find_near_duplicates(images)
    assert [group.places for group in found] == [[1, 5], [0, 2, 3, 4]]
    assert (found[0].nearest, found[1].nearest[:2]) == ([5, 1], [3, 4])
    assert found[1].cosines == pytest.approx([np.cos(np.radians(12))] * 4, abs=1e-6)
    many = find_near_duplicates([images[0]] * 3000 + [images[1]])
    assert [len(group.places) for group in many] == [3000]


def test_patches_are_averaged_by_place_and_projected_the_same_way_each_time() -> None:
    patches = torch.arange(64.0).reshape(64, 1)
    corner = float(patches.reshape(8, 8)[:2, :2].mean())
    assert average_patches(patches)[0] == corner
    assert average_patches(patches).shape == (16,)
    wide = torch.randn(64, 100)
    assert average_patches(wide).shape == (512,)
    np.testing.assert_array_equal(average_patches(wide), average_patches(wide.clone()))


def test_the_page_escapes_every_text() -> None:
    bad = "<script>alert(1)</script>"
    item = InspectItem("train", bad, ["surprising"], [None], [bad], bad, bad, bad, [("loss", "1.0")])
    page = render_inspect_page(InspectPage(bad, [(bad, bad)], [bad], [InspectList("near", bad, 1, bad, "", [item])]))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 9
    assert "cannot be opened" in page
