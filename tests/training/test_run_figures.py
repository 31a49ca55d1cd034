"""A run of own rows measures what its scores are worth, and shows it in metrics, report, terminal and card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_llava.commands.main import main
from lora_llava.data.conversation import Conversation, Turn
from lora_llava.evaluation.figures.majority import saved_majority
from lora_llava.evaluation.scoring import rows_to_shuffle
from lora_llava.prepare.answer_balance import balance_lines
from lora_llava.publishing.card import model_card
from lora_llava.publishing.package import collect
from lora_llava.recipe.io import check_recipe
from tests.own_rows import drawn
from tests.training.small_runs import run


@pytest.fixture
def content(stage2_content: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe with 36 rows about an image each, of which 12 are held out; two of three are fine."""
    images = drawn(tmp_path / "images", 36)
    lines = [f"{number}.png,Is it ok?,{'no' if number % 3 == 0 else 'Yes.'}" for number in range(36)]
    (tmp_path / "rows.csv").write_text("\n".join(["image,question,answer", *lines]) + "\n")
    stage2_content["data"] = {
        "format": "conversations",
        "path": str(tmp_path / "rows.csv"),
        "image_folder": str(images),
        "validation_rows": 12,
        "max_length": 400,
        "system_prompt": "",
    }
    stage2_content["training"] |= {"max_steps": 2, "eval_every": None}
    stage2_content["evaluation"] = {"max_new_tokens": 2}
    return stage2_content


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_and_its_evaluation(content: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = check_recipe(content, "test")
    printed = run(recipe)
    folder = Path(recipe.output_dir)
    metrics = json.loads((folder / "metrics.json").read_text())
    figures = metrics["figures"]
    held_out = lines_of(folder / "predictions_after.jsonl")
    yes = sum(line["reference"] == "Yes." for line in held_out)
    assert len(held_out) == 12
    assert figures["majority"]["table"]["all"]["exact_match"] == round(100 * yes / 12, 2)
    [question] = figures["majority"]["questions"]
    assert (question["name"], question["rows"], question["answers"][0]) == (
        "Is it ok?",
        24,
        ["Yes.", 24 - (12 - (12 - yes))],
    )
    weighed = lines_of(folder / "predictions_before_likelihood.jsonl")
    assert {line["text"] for line in weighed} <= {"Yes.", "no"}
    assert all(len(line["scores"]) == 2 for line in weighed)
    right = sum(line["exact"] for line in weighed)
    assert figures["before_by_likelihood"]["all"]["exact_match"] == round(100 * right / 12, 2)
    shuffled = lines_of(folder / "predictions_after_shuffled.jsonl")
    assert [line["question_id"] for line in shuffled] == [line["question_id"] for line in held_out]
    assert (figures["shuffled"]["rows"], figures["shuffled"]["of"]) == (12, 12)
    assert any(a.get("loss") != b.get("loss") for a, b in zip(shuffled, held_out, strict=True))
    assert figures["confusion"][0]["answers"] == ["Yes.", "no"]
    page = (folder / "report.html").read_text()
    for sentence in figures["sentences"]:
        assert " ".join(sentence.split()) in " ".join(printed.split())
        assert sentence.replace("'", "&#39;") in page
    assert "majority answer" in page
    assert "Confusion: references down" in page
    assert main("evaluate", [str(folder)]) == 0
    assert "majority answer" in capsys.readouterr().out
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["figures"]["majority"] == figures["majority"]
    assert evaluation["figures"]["confusion"] == figures["confusion"]
    package = collect(folder, "me/base", "c" * 40)
    published = json.loads(package.files["metrics.json"])
    assert published["figures"]["majority"] == {"table": figures["majority"]["table"]}
    card = model_card._results(package)
    assert "| all | majority answer |" in card
    assert "### Confusion: references down, answers across" in card
    before = page
    assert main("report", [str(folder)]) == 0
    assert (folder / "report.html").read_text() == before
    del metrics["figures"]["confusion"][0]["counts"]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    capsys.readouterr()
    assert main("report", [str(folder)]) == 2
    assert "metrics.json: figures cannot be read (KeyError('counts'))" in capsys.readouterr().err


def test_shuffling_can_be_left_out(content: dict[str, Any]) -> None:
    content["evaluation"] |= {"shuffled": 0, "before": 0, "after": 4}
    recipe = check_recipe(content, "test")
    run(recipe)
    folder = Path(recipe.output_dir)
    figures = json.loads((folder / "metrics.json").read_text())["figures"]
    assert (figures["shuffled"], figures["before_by_likelihood"]) == (None, None)
    assert [gain["over"] for gain in figures["gains"]] == ["majority"]
    assert not (folder / "predictions_after_shuffled.jsonl").exists()
    assert saved_majority(folder) is not None
    (folder / "metrics.json").write_text("{}")
    assert saved_majority(folder) is None


def conversations(count: int, images: int) -> list[Conversation]:
    turns = (Turn("user", "Is it ok?"), Turn("assistant", "yes"))
    return [Conversation(str(n), turns, (f"{n % images}.png",) if images else ()) for n in range(count)]


@pytest.mark.parametrize(
    ("rows", "share", "expected"), [(30, 0.25, 30), (400, 0.25, 100), (4000, 0.25, 400), (100, 0.01, 40)]
)
def test_the_share_of_shuffled_rows(rows: int, share: float, expected: int) -> None:
    given = conversations(rows, rows)
    places, shuffled = rows_to_shuffle(given, share, 0)
    assert len(places) == len(shuffled) == expected
    assert all(row.images != given[place].images for place, row in zip(places, shuffled, strict=True))
    assert all(row.row_id == given[place].row_id for place, row in zip(places, shuffled, strict=True))


def test_rows_that_share_one_image_or_have_none_are_not_shuffled() -> None:
    assert rows_to_shuffle(conversations(10, 1), 1, 0) == ([], [])
    assert rows_to_shuffle(conversations(10, 0), 1, 0) == ([], [])


def write_rows(content: dict[str, Any], lines: list[str]) -> None:
    Path(content["data"]["path"]).write_text("\n".join(["image,question,answer,category", *lines]) + "\n")


def test_check_prints_the_balance_and_warns_above_80_percent(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content["data"]["validation_rows"] = 0
    content["evaluation"] = None
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(content))

    def checked(lines: list[str]) -> tuple[str, list[str]]:
        write_rows(content, lines)
        assert main("check", [str(recipe), "--json", str(tmp_path / "found.json")]) == 0
        report = json.loads((tmp_path / "found.json").read_text())
        return capsys.readouterr().out, [each["message"] for each in report["warnings"] if each["kind"] == "one answer"]

    shown, warned = checked([f"{n}.png,Is it ok?,{'no' if n < 5 else 'yes'}," for n in range(25)])
    assert "Is it ok?: 25 rows; yes 80%, no 20%" in shown
    assert warned == []
    shown, warned = checked([f"{n}.png,Is it ok?,{'no' if n < 4 else 'YES.'}," for n in range(25)])
    assert warned == [
        "84% of the 25 rows have the answer 'YES.': a model that always gives it scores as high; add rows with other "
        "answers"
    ]
    kinds = [f"{n}.png,What?,{n % 4},size" for n in range(30)] + [f"{n}.png,Which?,Öl,kind" for n in range(20)]
    shown, warned = checked(kinds)
    assert "type: size: 30 rows; 0 27%, 1 27%, 2 23%, 3 23%" in shown
    assert warned[0].startswith("all of the 20 rows of 'type: kind' have the answer 'Öl'")


def test_free_texts_have_no_balance() -> None:
    from lora_llava.evaluation.figures.majority import count_answers

    counts = count_answers((None, "Describe it.", f"text {n // 2}") for n in range(30))
    assert [str(line) for line in balance_lines(counts)][1:] == [
        "  Describe it.: 30 rows; text 0 7%, text 1 7%, text 2 7%, text 3 7%, 11 other answers"
    ]
    assert balance_lines(count_answers((None, "Describe it.", f"text {n}") for n in range(30))) == []
    assert balance_lines(None) == []
