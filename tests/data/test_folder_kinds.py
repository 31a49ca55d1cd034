"""Twelve kinds of folder and one more, each clean and dirty, go from `init` to a checked recipe."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data import folders_exported, folders_made

from lora_llava.commands.main import main
from lora_llava.recipe import load_recipe

Rows = dict[str, list[dict[str, Any]]]


def init(folder: Path, *flags: str) -> int:
    return main(None, ["init", str(folder), "--model", "demo", *flags])


def written(folder: Path) -> Rows:
    """Return the rows that were written, by split."""
    files = (folder / "recipe_rows" / f"{split}.jsonl" for split in ("train", "validation", "test"))
    return {f.stem: [json.loads(line) for line in f.read_text().splitlines()] for f in files if f.exists()}


def checked(folder: Path, tmp_path: Path, *flags: str) -> dict[str, Any]:
    """Check the recipe, and return the report."""
    report = tmp_path / "report.json"
    main(None, ["check", str(folder / "recipe.yaml"), "--json", str(report), *flags])
    content: dict[str, Any] = json.loads(report.read_text())
    return content


def tidy(text: str) -> str:
    """Return printed text without the lines of tables, in one line."""
    return " ".join(text.replace("│", " ").split())


def answers(rows: list[dict[str, Any]]) -> Counter[str]:
    return Counter(row["answer"] if "answer" in row else row["caption"] for row in rows)


BUILDERS: dict[str, Callable[[Path, bool], None]] = {
    "class folders": folders_made.class_folders,
    "Excel": folders_made.excel,
    "LibreOffice": folders_made.libre_office,
    "COCO captions": folders_made.coco_captions,
    "COCO boxes": folders_made.coco_boxes,
    "Label Studio": folders_exported.label_studio,
    "CVAT": folders_exported.cvat,
    "VQA": folders_exported.vqa,
    "WebDataset": folders_exported.web_dataset,
    "imagefolder": folders_exported.hugging_face,
    "other language": folders_exported.foreign_table,
    "labels": folders_exported.label_table,
    "YOLO": folders_exported.yolo,
}
WORKBOOKS = ("Excel", "LibreOffice")


def build(name: str, folder: Path, dirty: bool) -> None:
    if name in WORKBOOKS:
        pytest.importorskip("python_calamine", reason="pip install 'lora_llava[excel]'")
    folder.mkdir(parents=True)
    BUILDERS[name](folder, dirty)


CLEAN: dict[str, tuple[int, dict[str, Any]]] = {
    "class folders": (
        10,
        {
            "id": "deep_scratch/0.png",
            "image": "deep_scratch/0.png",
            "question": "Which of these is in the image: deep scratch or ok? Answer with one of them.",
            "answer": "deep scratch",
        },
    ),
    "Excel": (6, {"id": "Sheet1 row 2", "image": "0.png", "question": "What is it?", "answer": "thing 0"}),
    "LibreOffice": (8, {"id": "Blatt row 2", "image": "0.png", "caption": "A thing 0."}),
    "COCO captions": (7, {"id": "captions.json annotation 10", "image": "images/0.png", "caption": "A thing 0."}),
    "COCO boxes": (
        9,
        {
            "id": "_annotations.coco.json image 0 presence yes",
            "image": "train/0.png",
            "question": 'Is there an object of the kind "red cup" in the image? Answer yes or no.',
            "answer": "yes",
            "question_type": "presence",
        },
    ),
    "Label Studio": (
        4,
        {
            "id": "project-1.json task 0 state",
            "image": "0.png",
            "question": "Which of these is in the image: bad one or good? Answer with one of them.",
            "answer": "bad one",
        },
    ),
    "CVAT": (
        4,
        {
            "id": "annotations.xml image 0 tag",
            "image": "images/0.png",
            "question": "Which of these is in the image: new or worn out? Answer with one of them.",
            "answer": "new",
        },
    ),
    "VQA": (
        4,
        {
            "id": "v2_OpenEnded_mscoco_train2014_questions.json question 10",
            "image": "train2014/COCO_train2014_000000000001.png",
            "question": "Is it 1?",
            "answer": "yes",
            "question_type": "yes/no",
        },
    ),
    "WebDataset": (
        4,
        {"id": "train-000000.tar 0000", "image": "train-000000/0000.png", "caption": "A thing 0."},
    ),
    "imagefolder": (4, {"id": "metadata.jsonl line 1", "image": "0.png", "text": "A thing 0."}),
    "labels": (
        8,
        {
            "id": "labels.csv line 2",
            "image": "0.png",
            "question": "Which of these is in the image: deep scratch or ok? Answer with one of them.",
            "answer": "deep scratch",
        },
    ),
    "YOLO": (
        8,
        {
            "id": "labels/0.txt presence yes",
            "image": "images/0.png",
            "question": 'Is there an object of the kind "cup" in the image? Answer yes or no.',
            "answer": "yes",
            "question_type": "presence",
        },
    ),
}


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_folder_becomes_a_checked_recipe(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    build(name, folder, dirty=False)
    assert init(folder) == 0
    printed = tidy(capsys.readouterr().out)
    count, first = CLEAN[name]
    rows = written(folder)
    assert (list(rows), len(rows["train"]), rows["train"][0]) == (["train"], count, first)
    report = checked(folder, tmp_path)
    assert (report["rows"], report["errors"], report["warnings"]) == (count, [], [])
    assert f"rows {count} " in printed
    assert "left out" not in printed
    assert printed.index("an example image: ") < printed.index("wrote ")
    assert load_recipe(folder / "recipe.yaml").output_dir == "runs/mine"


def test_a_clean_table_in_another_language_is_read_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    build("other language", folder, dirty=False)
    assert init(folder) == 0
    assert "columns Bild is the image, Frage is the question, Antwort is the answer" in tidy(capsys.readouterr().out)
    columns = load_recipe(folder / "recipe.yaml").data.columns
    assert (columns.image, columns.question, columns.answer) == ("Bild", "Frage", "Antwort")
    assert not (folder / "recipe_rows").exists()
    report = checked(folder, tmp_path)
    assert (report["rows"], report["errors"], report["warnings"]) == (6, [], [])


DIRTY: dict[str, tuple[dict[str, dict[str, int]], list[str]]] = {
    "class folders": (
        {
            "train": {"OK": 4, "deep scratch": 5},
            "validation": {"OK": 1, "deep scratch": 1},
            "test": {"OK": 1, "dent": 1},
        },
        [
            "1 image outside the class folders: top.png",
            "1 folder without images: Training/empty",
            "one class ok is read as OK",
            "in two classes: 1 image (Training/OK/OK0.PNG = Training/deep scratch/again.png); remove the wrong one",
            "test has dent, which is never trained",
        ],
    ),
    "Excel": (
        {"train": {str(n): 1 for n in range(3, 9)}},
        [
            "sheet Daten of Prüfung 1.XLSX, 8 rows",
            "2 sheets without rows: Notizen, leer",
            "1 column that is not read: Prüfer",
            "1 row with the problem: empty question: Daten row 11",
            "1 row whose image is not in the folder: fehlt.png",
        ],
    ),
    "LibreOffice": (
        {"train": {"bon": 3, "Défaut": 3}, "test": {"Défaut": 1}},
        [
            "classes in train Défaut 3, bon 3",
            "1 row without a value in Catégorie: test row 3",
            "1 row whose image is not in the folder: 9.png",
            "without a row 1 image (7.png) not used",
        ],
    ),
    "COCO captions": (
        {"train": {f"A thing {n}.": 1 for n in range(3)} | {"Thing 0 again.": 1, "Thing 1 again.": 1, "Two lines.": 1}},
        [
            "1 annotation in instances_train2017.json, which --ask presence,count,place uses",
            "1 caption without text: captions_train2017.json annotation 7",
            "1 entry with the id of another image: 1",
            "2 images without a caption: train2017/3.png, train2017/4.png",
            "1 entry whose image is not in the folder: gone.png",
            "1 entry whose image is a URL or outside the folder: ../outside.png",
            "1 caption of such an entry: 50",
            "1 caption with an image_id that no image has: 99",
        ],
    ),
    "COCO boxes": (
        {split: {"yes": 3, "no": 4, "1": 1, "2": 1, "top left": 1} for split in ("train", "validation")},
        [
            "boxes 8 in 8 images: key 4, red cup 4",
            "2 boxes whose category_id is not in categories: 7",
            "2 boxes of such an entry: 88",
            "without a row 1 image (unlisted.png) not used",
        ],
    ),
    "Label Studio": (
        {"train": {"good": 1, "bad": 2, "A zero.": 1, "yes": 1, "no": 1, "1": 1, "top left": 1}},
        [
            "1 annotation that was cancelled: export 1.JSON task 4",
            "1 task whose image is a URL or outside the folder: https://example.org/x.png",
            "1 task whose image is not in the folder: gone.png",
            "1 answer on which annotators disagree: export 1.JSON task 3: bad / good",
            "1 result of type brushlabels, which is not read: export 1.JSON task 7",
        ],
    ),
    "CVAT": (
        {"train": {"red": 1, "1": 1, "2": 1, "top left": 1}},
        [
            "presence not asked: every image has cup",
            "1 attribute of boxes that share their label with others: annotations.xml image 1",
            "1 annotation of type polyline, which is not read: annotations.xml image 2",
            "1 attribute without a value: annotations.xml image 3",
            "1 entry whose image is not in the folder: 4.png",
            "1 entry whose image is a URL or outside the folder: ../../etc/passwd",
            "1 tag with the only value new, from which nothing can be learned",
        ],
    ),
    "VQA": (
        {split: {"two": 1, "yes": 3} for split in ("train", "validation")},
        [
            "2 questions without an answer: 15, 75",
            "2 questions whose image is not in the folder: 999",
            "2 annotations without a question: 17, 77",
        ],
    ),
    "WebDataset": (
        {"train": {"sea side": 1, "wood": 1, "A c.": 1}, "validation": {"wood": 1}},
        [
            "3 files in shards that are links or lead out of the archive: ../../evil.png, ../../evil.txt, f.png",
            "1 file in shards of type .seg.npy, which is not read: g.seg.npy",
            "2 samples without a text, a caption or a class: train-000000.tar.gz d, train-000000.tar.gz g",
            "2 samples without an image: train-000000.tar.gz e, train-000000.tar.gz f",
        ],
    ),
    "imagefolder": (
        {"train": {"0": 2, "1": 2}, "test": {"1": 1}},
        [
            "1 row whose image is not in the folder: gone.png",
            "1 row without an image's name",
            "1 column that is not read: width",
            "class names numbers only",
            "without a row 1 image (bare.png) not used",
        ],
    ),
    "labels": (
        {"train": {"ok": 4, "scratch": 4}},
        [
            "no names: ./0.png and below name images, scratch and below are labels",
            "1 row without a value in the second column: labels.tsv line 7",
            "two classes for one image in labels.tsv: 1 image (7.png: ok / scratch); correct the wrong rows",
        ],
    ),
    "YOLO": (
        {split: {"yes": 2, "no": 2, "1": 1, "center": 1, "2": 1} for split in ("train", "validation")},
        [
            "images with a box of a class without a name: train/labels/2.txt line 1: class 9",
            "2 label files whose image is not in the folder: train/labels/gone.txt, valid/labels/gone.txt",
            "2 images without a label file",
        ],
    ),
}


@pytest.mark.parametrize("name", DIRTY)
def test_a_dirty_folder_becomes_a_checked_recipe(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    build(name, folder, dirty=True)
    assert init(folder) == 0
    printed = tidy(capsys.readouterr().out)
    expected, messages = DIRTY[name]
    rows = written(folder)
    found = {split: [row["Antwort"] for row in each] for split, each in rows.items()} if name == "Excel" else None
    assert found or {split: dict(answers(each)) for split, each in rows.items()} == expected
    if found:
        assert {split: dict(Counter(each)) for split, each in found.items()} == expected
    assert [message for message in messages if message not in printed] == []
    report = checked(folder, tmp_path)
    assert (report["rows"], report["errors"]) == (sum(map(len, rows.values())), [])
    recipe = load_recipe(folder / "recipe.yaml")
    sources = {"validation": recipe.data.validation_source, "test": recipe.data.test_source}
    assert [split for split, source in sources.items() if source] == [s for s in rows if s != "train"]


def test_a_dirty_table_is_fixed_by_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    build("other language", folder, dirty=True)
    assert init(folder) == 1
    printed = tidy(capsys.readouterr().out)
    assert "missing images 1 image (fehlt.png); check --fix leaves out such rows" in printed
    assert printed.endswith(f"lora-llava check {folder / 'recipe.yaml'!s} --fix")
    report = checked(folder, tmp_path, "--fix")
    assert [finding["kind"] for finding in report["errors"]] == ["missing image"]
    fixed = str(folder / "Übersicht 2024.fixed.CSV")
    assert f"data.path is now {fixed}; it was {folder / 'Übersicht 2024.CSV'}" in tidy(capsys.readouterr().out)
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.data.path == fixed
    report = checked(folder, tmp_path)
    assert (report["rows"], report["errors"]) == (6, [])
