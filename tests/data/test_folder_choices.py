"""What a person chooses about a folder: columns, sheets, questions, updates; and folders that cannot be used."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from data.folders_exported import label_table, web_dataset
from data.folders_made import class_folders, coco_boxes, draw, numbered, save, xlsx
from data.test_folder_kinds import answers, checked, init, tidy, written
from rich.console import Console

from lora_llava.core.errors import UserError
from lora_llava.data.folder import understand_folder
from lora_llava.data.folder_kinds import KINDS
from lora_llava.data.folder_kinds.box_questions import PLACES
from lora_llava.data.folder_kinds.column_words import role_of
from lora_llava.data.folder_kinds.folder_kind import ASKED, FolderOptions
from lora_llava.prepare.new_recipe import init as init_folder
from lora_llava.prepare.terminal_asker import TerminalAsker, asker_for
from lora_llava.recipe import load_recipe


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    capsys.readouterr()
    assert init(folder, *flags) == 2
    assert not (folder / "recipe.yaml").exists()
    return capsys.readouterr().err.strip()


def table(folder: Path, header: str, *rows: str, name: str = "rows.csv") -> Path:
    draw(folder, *numbered(len(rows)))
    save(folder / name, "\n".join([header, *(f"{n}.png,{row}" for n, row in enumerate(rows))]) + "\n")
    return folder


@pytest.mark.parametrize(
    ("columns", "roles"),
    [
        ("Bilddatei Frage Antwort", "image question answer"),
        ("nom_fichier Question Réponse", "image question answer"),
        ("IMAGEN pregunta Respuesta", "image question answer"),
        ("Immagine Domanda Risposta", "image question answer"),
        ("imagem Pergunta resposta", "image question answer"),
        ("Bild Bildunterschrift", "image caption"),
        ("fichier légende", "image caption"),
        ("archivo Descripción", "image caption"),
        ("file didascalia", "image caption"),
        ("Arquivo descrição", "image caption"),
        ("Dateiname Klasse", "image label"),
        ("photo Étiquette", "image label"),
        ("fichero Categoría", "image label"),
        ("immagine etichetta", "image label"),
        ("ficheiro rótulo", "image label"),
        ("afbeelding vraag antwoord", "image question answer"),
        ("图片 问题 答案", "image question answer"),
    ],
)
def test_names_of_columns_in_several_languages(columns: str, roles: str) -> None:
    assert [role_of(name) for name in columns.split()] == roles.split()


def test_columns_are_named_by_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = table(tmp_path / "mine", "Aufnahme Nr,Was,Dann", "Farbe?,rot", "Form?,rund")
    message = refused(folder, capsys)
    assert message == (
        f"error: {folder}/rows.csv: its columns are Aufnahme Nr, Was, Dann; Aufnahme Nr is the image; rename them to "
        "image, question, answer, or say which is which, such as --columns question=Was,answer=Dann; if the folder of "
        "each image is its class, use --class-folders"
    )
    assert refused(folder, capsys, "--columns", "qestion=Was") == (
        'error: --columns qestion=Was: qestion is not a role (did you mean "question"?); use image, question, answer, '
        "caption, label, id"
    )
    assert "has no column Dan (did you mean" in refused(folder, capsys, "--columns", "answer=Dan,question=Was")
    assert init(folder, "--columns", "image=aufnahme nr,question=Was,answer=Dann") == 0
    columns = load_recipe(folder / "recipe.yaml").data.columns
    assert (columns.image, columns.question, columns.answer) == ("Aufnahme Nr", "Was", "Dann")


def test_the_person_at_the_terminal_chooses_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Type a wrong number first; the question's column by name."""
    folder = table(tmp_path / "mine", "Aufnahme Nr,Was,Dann", "Farbe?,rot", "Form?,rund")
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("9\n1\nWas\n3\n"))
    asker = TerminalAsker(Console(file=out, width=80))
    found = understand_folder(folder, options=FolderOptions(asker=asker))
    assert (found.columns.image, found.columns.question, found.columns.answer) == ("Aufnahme Nr", "Was", "Dann")
    assert "Which column of rows.csv is the image?\n  1  Aufnahme Nr\n  2  Was" in out.getvalue()
    assert "9 is none of them; type a number from 1 to 4" in out.getvalue()


def test_nobody_is_asked_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert asker_for(console).choose("Which?", ["a"], None) is None
    asker = TerminalAsker(console)
    assert (asker.choose("Which?", ["a", "b"], "b"), asker.text("What?", "This?")) == ("b", "This?")


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (["ok", "ok", "scratch"], "class"),
        ([f"thing {n}" for n in range(9)], "caption"),
        (["a dog on a long brown bench", "a dog on a long brown bench"], "caption"),
        (["cat", "dog"] * 5, "class"),
    ],
)
def test_a_label_is_a_class_or_a_caption(labels: list[str], kind: str, tmp_path: Path) -> None:
    folder = table(tmp_path / "mine", "file,label", *labels)
    for chosen in (None, "class", "caption"):
        if chosen == "class" and len(set(labels)) == 1:
            continue
        found = understand_folder(folder, options=FolderOptions(label_is=chosen))
        assert found.form == ("captions" if (chosen or kind) == "caption" else "conversations")
        assert next(text for name, text in found.facts if name == "label").startswith(f"a {chosen or kind}")


def test_the_question_of_classes_is_the_person_s(tmp_path: Path) -> None:
    class_folders(tmp_path / "mine", dirty=False)
    assert init(tmp_path / "mine", "--question", "Ist die Naht in Ordnung?") == 0
    assert {row["question"] for row in written(tmp_path / "mine")["train"]} == {"Ist die Naht in Ordnung?"}


@pytest.mark.parametrize("ask", [*ASKED[:3], "presence,place"])
def test_what_is_asked_about_boxes(ask: str, tmp_path: Path) -> None:
    coco_boxes(tmp_path / "mine", dirty=False)
    assert init(tmp_path / "mine", "--ask", ask) == 0
    rows = written(tmp_path / "mine")["train"]
    assert {row["question_type"] for row in rows} == set(ask.split(","))
    assert {row["answer"] for row in rows if row["question_type"] == "place"} <= set(PLACES)


def test_a_label_is_asked_about_where_it_is_in_the_image(tmp_path: Path) -> None:
    for n, place in enumerate(PLACES):
        x, y = n % 3 * 10, n // 3 * 10
        draw(tmp_path / place, f"{n}.png")
        images = [{"id": n, "file_name": f"{n}.png", "width": 30, "height": 30}]
        boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [x, y, 10, 10]}]
        save(
            tmp_path / place / "a.json",
            {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "c"}]},
        )
        found = understand_folder(tmp_path / place, options=FolderOptions(ask=("place",))).converted
        assert found is not None
        assert [row["answer"] for row in found.splits["train"]] == [place]


def test_a_workbook_with_several_sheets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("python_calamine", reason="pip install 'lora_llava[excel]'")
    folder = tmp_path / "mine"
    draw(folder, *numbered(4))
    rows = [["image", "question", "answer"], *([f"{n}.png", "What?", f"It is {n}."] for n in range(4))]
    xlsx(folder / "rows.xlsx", {"A": rows, "B": rows[:3], "Notes": [["note"], ["x"]]})
    assert refused(folder, capsys) == (
        f"error: {folder}/rows.xlsx has several sheets: A (4 rows), B (2 rows), Notes (1 row); name one with --sheet"
    )
    assert "has no such sheet" in refused(folder, capsys, "--sheet", "C")
    assert init(folder, "--sheet", "B") == 0
    printed = tidy(capsys.readouterr().out)
    assert "sheet B of rows.xlsx, 2 rows" in printed
    assert "rows of other sheets" not in printed
    assert [row["id"] for row in written(folder)["train"]] == ["B row 2", "B row 3"]


def test_a_workbook_without_its_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    xlsx(tmp_path / "rows.xlsx", {"A": [["image"]]})
    monkeypatch.setitem(sys.modules, "python_calamine", None)
    with pytest.raises(UserError, match=r"pip install 'lora_llava\[excel\]'; or save its sheet as CSV"):
        understand_folder(tmp_path)


def test_folders_that_teach_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = tmp_path / "one"
    draw(one, "train/ok/a.png", "test/ok/b.png")
    assert "every image is labelled ok; a model would only learn to say that" in refused(one, capsys)
    draw(tmp_path / "flat", "photos/a.png")
    assert "all its images are in one folder, photos; sort them" in refused(tmp_path / "flat", capsys)
    draw(tmp_path / "held", "test/ok/a.png", "test/bad/b.png")
    assert "has class folders only under test, which are held-out images" in refused(tmp_path / "held", capsys)
    same = table(tmp_path / "same", "file,class", "ok", "ok", "OK")
    assert "rows.csv: every image is labelled ok" in refused(same, capsys)


def test_boxes_without_categories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    coco_boxes(folder, dirty=False)
    file = folder / "train" / "_annotations.coco.json"
    content = json.loads(file.read_text())
    save(file, {key: value for key, value in content.items() if key != "categories"})
    assert refused(folder, capsys).startswith(f"error: {file}: it has boxes and no categories, so their labels have no")


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("0.png,bad\n1.png,bad\n9.png,ok\n", " disagree on 1 of 2 rows, such as 0.png: ok / bad)"),
        ("0.png,ok\n1.png,bad\n", " agree on all 2 rows that they share)"),
        ("8.png,ok\n", " have no image in common)"),
    ],
)
def test_two_tables(second: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = table(tmp_path / "mine", "image,label", "ok", "bad", "ok", name="a.csv")
    save(folder / "b.csv", "image,label\n" + second)
    assert refused(folder, capsys) == (
        f"error: {folder} has 2 possible files of rows: a.csv, b.csv; name one with --data (a.csv and b.csv{said}"
    )
    assert init(folder, "--data", str(folder / "a.csv")) == 0
    assert dict(answers(written(folder)["train"])) == {"ok": 2, "bad": 1}


def test_a_table_that_contradicts_the_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    draw(folder, "ok/a.png", "bad/b.png", "bad/c.png")
    save(folder / "labels.csv", "file,label\nok/a.png,ok\nbad/b.png,ok\nbad/c.png,bad\n")
    assert init(folder) == 0
    assert "in the folder of another class than labels.csv says: 1 image (bad/b.png)" in tidy(capsys.readouterr().out)
    (folder / "recipe.yaml").unlink()
    assert init(folder, "--class-folders") == 0
    assert dict(answers(written(folder)["train"])) == {"ok": 1, "bad": 2}


def test_two_kinds_in_one_folder_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    coco_boxes(folder, dirty=False)
    label_table(folder, dirty=False)
    assert refused(folder, capsys) == (
        f"error: {folder} has COCO annotations (train/_annotations.coco.json) and a table (labels.csv); name the file "
        "to use with --data"
    )
    assert init(folder, "--data", str(folder / "train" / "_annotations.coco.json")) == 0
    assert len(written(folder)["train"]) == 9


def test_an_update_refreshes_the_data_and_keeps_the_person_s_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    class_folders(folder, dirty=False)
    assert init(folder, "--question", "Is it ok?") == 0
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        recipe.read_text().replace("epochs: 30", "epochs: 7").replace("validation_rows: 2", "validation_rows: 3")
    )
    assert init(folder) == 2
    assert "exists already; add --update to refresh its data part and keep your changes" in capsys.readouterr().err
    draw(folder, *(f"dent/{name}" for name in numbered(20)), "test/ok/t.png", "test/dent/u.png")
    assert main_update(folder) == 0
    printed = tidy(capsys.readouterr().out)
    assert "as before: --question" in printed
    assert "kept data.validation_rows: 3, which you changed" in printed
    assert "data.test_source: {" in printed
    found = load_recipe(recipe)
    assert (found.training.epochs, found.data.validation_rows) == (7, 3)
    assert found.data.test_source is not None
    rows = written(folder)
    assert ({row["question"] for row in rows["train"]}, len(rows["train"]), len(rows["test"])) == ({"Is it ok?"}, 30, 2)
    assert "# few rows, seen often" in recipe.read_text()
    shutil.rmtree(folder / "test")
    assert main_update(folder) == 0
    assert load_recipe(recipe).data.test_source is None
    assert list(written(folder)) == ["train"]
    assert checked(folder, tmp_path)["errors"] == []


def main_update(folder: Path) -> int:
    from lora_llava.commands.main import main

    return main(None, ["init", str(folder), "--update"])


def test_an_update_after_a_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = table(tmp_path / "mine", "image,question,answer", "What?,One.", "What?,Two.", "What?,Three.")
    (folder / "2.png").unlink()
    assert init(folder) == 1
    checked(folder, tmp_path, "--fix")
    recipe = folder / "recipe.yaml"
    assert load_recipe(recipe).data.path == str(folder / "rows.fixed.csv")
    assert main_update(folder) == 0
    assert load_recipe(recipe).data.path == str(folder / "rows.fixed.csv")
    draw(folder, "2.png", "3.png")
    with (folder / "rows.csv").open("a") as stream:
        stream.write("3.png,What?,Four.\n")
    os.utime(folder / "rows.fixed.csv", (1, 1))
    assert main_update(folder) == 0
    assert load_recipe(recipe).data.path == str(folder / "rows.csv")
    assert "rows.fixed.csv, which is older than rows.csv" in tidy(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("line", "becomes"),
    [
        ("  path: {0}/rows.csv  # mine\n", "  path: {0}/rows.fixed.csv  # mine\n"),
        ("  path: '{0}/rows.csv'\n", "  path: {0}/rows.fixed.csv\n"),
        ("  sources: [{{path: {0}/rows.csv, weight: 2}}]\n", "  sources: [{{path: {0}/rows.fixed.csv, weight: 2}}]\n"),
        ("  sources:\n    - path: {0}\n", "  sources:\n    - path: {0}/rows.fixed.csv\n"),
    ],
)
def test_a_fix_changes_one_value_of_the_recipe(line: str, becomes: str, tmp_path: Path) -> None:
    folder = table(tmp_path / "mine", "image,question,answer", "What?,One.", "What?,Two.", "What?,")
    model = "{llm: demo, vision_tower: demo, start_from: {untrained: true}}"
    head = f"stage: 2\noutput_dir: x  # here\nmodel: {model}\nlora: {{}}\ndata:\n"
    tail = "  format: conversations\n  template: vicuna_v1\ntraining: {learning_rate: 1e-3, epochs: 1}\n"
    (folder / "recipe.yaml").write_text(head + line.format(folder) + tail)
    checked(folder, tmp_path, "--fix")
    assert (folder / "recipe.yaml").read_text() == head + becomes.format(folder) + tail


def test_a_fix_of_an_override_leaves_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = table(tmp_path / "mine", "image,question,answer", "What?,One.", "What?,Two.", "What?,")
    assert init(folder) == 1
    other = shutil.copy(folder / "rows.csv", tmp_path / "other.csv")
    before = (folder / "recipe.yaml").read_text()
    checked(folder, tmp_path, "--fix", f"data.path={other}")
    assert (folder / "recipe.yaml").read_text() == before
    assert f"to use it, write data.path: {tmp_path}/other.fixed.csv into your recipe" in tidy(capsys.readouterr().out)


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    web_dataset(tmp_path / "mine", dirty=False)
    before = sorted(tmp_path.rglob("*"))
    assert init(tmp_path / "mine", "--dry-run") == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_unpacked_images_of_an_interrupted_call_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    web_dataset(folder, dirty=False)
    assert init(folder) == 0
    images = sorted((folder / "recipe_rows" / "images").rglob("*.png"))
    assert [file.name for file in images] == [f"{n:04d}.png" for n in range(4)]
    times = [file.stat().st_mtime_ns for file in images]
    images[2].write_bytes(b"half")
    assert main_update(folder) == 0
    assert [file.stat().st_mtime_ns == time for file, time in zip(images, times, strict=True)] == [
        True,
        True,
        False,
        True,
    ]


def test_a_language_model_and_a_tower_still_make_a_new_llava(tmp_path: Path, parts: Path) -> None:
    folder = tmp_path / "mine"
    class_folders(folder, dirty=False)
    llm, tower = str(parts / "llm"), str(parts / "vision_tower")
    target, report = init_folder(folder, llm=llm, vision_tower=tower, console=Console(file=io.StringIO()))
    model: Any = load_recipe(target).model
    assert (model.llm, model.vision_tower, model.start_from.untrained, report.errors) == (llm, tower, True, [])


def test_every_kind_has_a_file_of_its_own() -> None:
    modules = {type(kind).__module__ for kind in KINDS}
    assert len(modules) == len(KINDS) == 8


def test_what_init_prints_of_a_small_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = table(
        tmp_path / "mine", "image,question,answer,question_type,note", "Is it ok?,yes,state,x", "Hue?,red,,x"
    )
    assert init(folder, "--dry-run") == 0
    printed = tidy(capsys.readouterr().out)
    assert "validation at least 1 row, held out by image" in printed
    assert "for the score question_type" in printed
    assert "not used note" in printed
