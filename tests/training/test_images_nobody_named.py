"""What `check` calls an error, `finetune` refuses: sources whose images nobody named, held-out rows that are trained
on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.planning.run_plan import plan_run
from lora_llava.prepare.row_check import check
from lora_llava.recipe.io import check_recipe
from tests.own_rows import asked, drawn, quiet, written

Table = list[dict[str, str]]


def both(content: dict[str, Any], data: dict[str, Any]) -> tuple[list[tuple[str, str]], str | None]:
    """The errors that `check` finds, and why `finetune` refuses."""
    content["evaluation"] = None
    content["data"] = {"format": "conversations", "max_length": 300, "system_prompt": "", **data}
    report = check(check_recipe(content, "test"), console=quiet())
    errors = [
        (finding.kind, f"{finding.name and f'{finding.split} {finding.name}: '}{finding.message}")
        for finding in report.errors
    ]
    try:
        plan_run(check_recipe(content, "test"))
    except UserError as error:
        return errors, str(error)
    return errors, None


def table(folder: Path, column: str, names: list[str]) -> str:
    drawn(folder / "images", 4)
    lines = [f"{name},Is it {place}?,Yes." for place, name in enumerate(names)]
    (folder / "q.csv").write_text("\n".join([f"{column},question,answer", *lines]) + "\n")
    return str(folder / "q.csv")


@pytest.mark.parametrize(
    ("column", "names"),
    [
        ("image_path", ["0.png", "1.png"]),
        ("foto", ["0.png", ""]),
        ("image_path", ["0", "1"]),
        ("img", ['"[""0.png"", ""1.png""]"', "2.png"]),
    ],
)
@pytest.mark.parametrize("folder", [True, False])
def test_images_that_nobody_named_are_an_error_with_the_column(
    stage2_content: dict[str, Any], tmp_path: Path, column: str, names: list[str], folder: bool
) -> None:
    data = {"path": table(tmp_path, column, names)} | ({"image_folder": str(tmp_path / "images")} if folder else {})
    errors, refused = both(stage2_content, data)
    count = len([name for name in names if name])
    message = (
        f"q: no row has an image, and the column {column} seems to name one in {count} of 2 rows; set data.columns: "
        f"{{image: {column}}}, or remove the column to train on text alone"
    )
    assert (errors, refused) == ([("no images", message)], message)


@pytest.mark.parametrize("folder", [True, False])
def test_images_beside_rows_that_name_none_are_an_error(
    stage2_content: dict[str, Any], tmp_path: Path, folder: bool
) -> None:
    data = {"path": table(tmp_path, "number", ["0", "1"])}
    data |= {"image_folder": str(tmp_path / "images")} if folder else {}
    errors, refused = both(stage2_content, data)
    assert [kind for kind, _ in errors] == ["no images"]
    assert refused == errors[0][1]
    assert "name their column with data.columns: {image: ...}" in str(refused)


def test_text_without_images_is_not_an_error(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "q.csv"
    file.write_text("topic,question,answer\na.b,Is it?,Yes.\nc,Was it?,No.\n")
    assert both(stage2_content, {"path": str(file)}) == ([], None)


def test_text_beside_another_source_s_images_is_not_an_error(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    drawn(tmp_path / "images", 4)
    shown = written(tmp_path / "shown.json", [asked(n, f"{n}.png") for n in range(4)])
    text = written(tmp_path / "text.json", [asked(n) for n in range(4, 8)])
    assert both(stage2_content, {"sources": [{"path": shown}, {"path": text}]}) == ([], None)


def test_some_rows_without_an_image_are_counted(
    stage2_content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = drawn(tmp_path / "images", 4)
    rows: list[dict[str, Any]] = [asked(n, f"{n}.png") for n in range(3)]
    rows += [asked(3) | {"image_path": "3.png"}, asked(4)]
    stage2_content["evaluation"] = None
    stage2_content["data"] = {
        "format": "conversations",
        "max_length": 300,
        "system_prompt": "",
        "image_folder": str(images),
        "path": written(tmp_path / "rows.json", rows),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(stage2_content))
    assert main(None, ["check", str(tmp_path / "recipe.yaml"), "--json", str(tmp_path / "report.json")]) == 0
    assert "train: 5 rows, 3 with images, 2 without;" in capsys.readouterr().out
    warnings = json.loads((tmp_path / "report.json").read_text())["warnings"]
    assert [(each["kind"], each["name"]) for each in warnings] == [("image not read", "row r3 (rows.json, index 3)")]
    assert main(None, ["finetune", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "train: 2 of 5 rows have no image" in out
    assert "1 image column not read: image_path" in out


@pytest.mark.parametrize("held", ["validation", "test"])
def test_a_held_out_row_that_is_trained_on_is_refused(
    stage2_content: dict[str, Any], tmp_path: Path, held: str
) -> None:
    images = drawn(tmp_path / "images", 4)
    (images / "copy.png").write_bytes((images / "1.png").read_bytes())
    train = written(tmp_path / "train.json", [asked(n, f"{n}.png") for n in range(3)])
    other = [asked(7, "3.png"), asked(1, "2.png"), {**asked(1, "copy.png"), "id": "again"}]
    source = {"path": written(tmp_path / "held.json", other), "image_folder": str(images)}
    errors, refused = both(stage2_content, {"path": train, "image_folder": str(images), f"{held}_source": source})
    message = (
        f"train row r1 (train.json, index 1): it has the question and images of {held} row again "
        "(held.json, index 2); remove it from one of them"
    )
    assert (errors, refused) == ([("held-out row in train", message)], message)


def test_test_rows_without_an_evaluation_are_checked(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    seen = set()
    for bad in range(4):
        images = drawn(tmp_path / f"images{bad}", 4)
        (images / f"{bad}.png").unlink()
        data = {"path": written(tmp_path / "rows.json", [asked(n, f"{n}.png") for n in range(4)])}
        errors, refused = both(stage2_content, data | {"image_folder": str(images), "test_rows": 1})
        message = f"row r{bad} (rows.json, index {bad}): image {bad}.png is missing"
        split = errors[0][1].partition(" ")[0]
        assert [found for _, found in errors] == [f"{split} {message}"]
        assert str(refused).startswith(message)
        seen.add(split)
    assert seen == {"train", "test"}


def test_a_source_of_a_mixture_without_rows_is_refused(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    good = written(tmp_path / "good.json", [asked(n) for n in range(4)])
    empty = written(tmp_path / "empty.json", [])
    errors, refused = both(stage2_content, {"sources": [{"path": good}, {"path": empty}]})
    message = "empty: it has no rows; fix its rows, or remove the source"
    assert (errors, refused) == ([("no rows", message)], message)


def test_a_refusal_names_the_line(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "q.csv"
    file.write_bytes('question,answer\n"Größe?\nJa?",Ja\n,Nein\n'.encode("cp1252"))
    errors, refused = both(stage2_content, {"path": str(file)})
    assert errors == [("empty question", "train q.csv, line 4: turn 0: the question is empty")]
    assert refused == "q.csv, line 4: turn 0: the question is empty"


def test_a_renamed_file_s_rows_have_its_new_name(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    for name in ("one.csv", "two.csv"):  # the second is encoded already
        (tmp_path / name).write_text("question,answer\n,Renamed.\nIs it?,Yes.\n")
        _, refused = both(stage2_content, {"path": str(tmp_path / name)})
        assert refused == f"{name}, line 2: turn 0: the question is empty"
