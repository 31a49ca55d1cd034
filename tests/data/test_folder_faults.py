"""Folders whose faults would teach something wrong, or end without a word: each is refused or counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data.folders_made import png, tar
from PIL import Image

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.data.folder import understand_folder
from lora_llava.data.folder_data import FolderData
from lora_llava.data.folder_kinds.folder_kind import FolderOptions, plain_files


def paint(*files: Path) -> None:
    for place, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (place * 20, 90, 40)).save(file)


def rows_of(found: FolderData) -> list[dict[str, Any]]:
    assert found.converted is not None
    return [row for rows in found.converted.splits.values() for row in rows]


def left_out(found: FolderData) -> str:
    assert found.converted is not None
    return "; ".join(found.converted.left_out.lines())


def test_a_gap_in_the_split_column_is_refused_since_test_rows_would_be_trained(tmp_path: Path) -> None:
    paint(*(tmp_path / f"{n}.png" for n in range(4)))
    lines = ["0.png,Colour?,red,train", "1.png,Colour?,blue,test", "2.png,Colour?,red,", "3.png,Colour?,red,train"]
    (tmp_path / "rows.csv").write_text("\n".join(["image,question,answer,split", *lines]))
    with pytest.raises(UserError, match=r"split is '', and other rows have train, val or test; fill it in"):
        understand_folder(tmp_path)
    (tmp_path / "rows.csv").write_text("\n".join(["image,question,answer,set", *(line + "A" for line in lines)]))
    assert understand_folder(tmp_path).rows == 4  # a column of other values names no splits


def test_a_label_file_that_is_not_understood_teaches_nothing_about_what_is_missing(tmp_path: Path) -> None:
    paint(*(tmp_path / "images" / f"{n}.png" for n in range(3)))
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "0.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (labels / "1.txt").write_text("1 0.5 0.5 0.2 0.2\nbroken line\n")
    (labels / "2.txt").write_text("1 0.2 0.5 0.2 0.2\n7 0.5 0.5 0.2 0.2\n")
    (tmp_path / "classes.txt").write_text("cat\n\ndog\n\n")
    found = understand_folder(tmp_path)
    assert {row["image"] for row in rows_of(found)} == {"images/0.png"}
    assert "broken" not in json.dumps(rows_of(found))
    assert "1 image with a line that is not class, x, y, width, height" in left_out(found)
    assert "1 image with a box of a class without a name" in left_out(found)


@pytest.mark.parametrize("flags", [["--class-folders"], []])
def test_no_images_in_class_folders_is_one_line(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    paint(tmp_path / "a.png")
    assert main(None, ["init", str(tmp_path), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_box_with_two_labels_shows_both(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", tmp_path / "b.png")
    shape = {"x": 10, "y": 10, "width": 20, "height": 20}
    tasks = [
        {
            "id": n,
            "data": {"image": f"{name}.png"},
            "annotations": [
                {
                    "result": [
                        {"type": "rectanglelabels", "from_name": "box", "value": shape | {"rectanglelabels": labels}}
                    ]
                }
            ],
        }
        for n, (name, labels) in enumerate([("a", ["cat", "pet"]), ("b", ["dog"])])
    ]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    asked = [row for row in rows_of(understand_folder(tmp_path)) if row["image"] == "a.png"]
    denied = [row["question"] for row in asked if row["answer"].lower().startswith("no")]
    assert not any("pet" in question or "cat" in question for question in denied)


def test_a_column_image_of_the_metadata_does_not_replace_the_file(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,image,text\na.png,http://x/1,A cat.\nb.png,http://x/2,A dog.\n")
    assert [row["image"] for row in rows_of(understand_folder(tmp_path))] == ["a.png", "b.png"]


def test_an_example_is_not_written_by_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(None, ["init", str(tmp_path / "new"), "--example", "--dry-run"]) == 2
    assert "leave one out" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def task(number: int, *results: dict[str, Any]) -> dict[str, Any]:
    return {"id": number, "data": {"image": f"{number}.png"}, "annotations": [{"result": list(results)}]}


def result(kind: str, **value: Any) -> dict[str, Any]:
    return {"type": kind, "from_name": kind, "value": value}


@pytest.mark.parametrize("end", ["", ", {]", "]]"], ids=["cut", "damaged", "more text"])
def test_an_export_that_is_damaged_after_some_tasks_is_refused(tmp_path: Path, end: str) -> None:
    paint(*(tmp_path / f"{n}.png" for n in range(3)))
    tasks = ",\n".join(json.dumps(task(n, result("choices", choices=[f"c{n}"]))) for n in range(3))
    (tmp_path / "export.json").write_text(f"[{tasks}{end}")
    with pytest.raises(UserError, match=r"export\.json, line 3: not JSON: .*; export it again$"):
        understand_folder(tmp_path)


def test_only_other_shapes_make_what_an_image_lacks_unknown(tmp_path: Path) -> None:
    paint(*(tmp_path / f"{n}.png" for n in range(4)))
    box = {"x": 1, "y": 1, "width": 5, "height": 5}
    tasks = [
        task(0, result("rectanglelabels", **box, rectanglelabels=["cat"]), result("taxonomy", taxonomy=[["a", "b"]])),
        task(1, result("rectanglelabels", **box, rectanglelabels=["dog"]), result("brushlabels", rle=[])),
        task(2, result("rectanglelabels", **box, rectanglelabels=["dog"]), result("rectangle", **box)),
        task(3, result("rectanglelabels", **box, rectanglelabels=["dog"]), result("choices", **box, choices=["old"])),
    ]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    found = understand_folder(tmp_path)
    assert {row["image"] for row in rows_of(found)} == {"0.png", "3.png"}
    assert "old" not in json.dumps(rows_of(found))
    assert "2 boxes of images with other annotations that are not read: export.json task 1, " in left_out(found)
    assert "1 result of type taxonomy, which is not read" in left_out(found)
    assert "1 result of type choices about a part of an image, which is not read" in left_out(found)


def test_every_value_of_json_min_is_read_or_counted(tmp_path: Path) -> None:
    paint(*(tmp_path / f"{n}.png" for n in range(2)))
    tasks: list[dict[str, Any]] = [
        {"id": n, "image": f"{n}.png", "annotation_id": n, "lead_time": 2.5, "annotator": 1, "state": ["a", f"b{n}"]}
        for n in range(2)
    ]
    tasks[0] |= {"stars": 4, "caption": {"text": ["A thing.", "It is red."]}, "tree": [["x", "y"]], "empty": None}
    tasks[1] |= {"stars": {"rating": 5}}
    (tmp_path / "min.json").write_text(json.dumps(tasks))
    found = understand_folder(tmp_path)
    assert [(row["image"], row["question"], row["answer"]) for row in rows_of(found)] == [
        ("0.png", "state: Which of these is in the image: a, b0, or b1? Answer with one of them.", "a, b0"),
        ("1.png", "state: Which of these is in the image: a, b0, or b1? Answer with one of them.", "a, b1"),
        ("0.png", "stars: What is the stars of the image? Answer with a number.", "4"),
        ("1.png", "stars: What is the stars of the image? Answer with a number.", "5"),
        ("0.png", "Describe the image briefly.", "A thing. It is red."),
    ]
    assert "1 value of tree that is not read; export JSON instead of JSON_MIN: min.json task 0" in left_out(found)


def test_boxes_beside_an_outline_of_cvat_that_is_not_read_are_counted(tmp_path: Path) -> None:
    paint(*(tmp_path / f"{n}.png" for n in range(3)))
    box = '<box label="cup" xtl="0" ytl="0" xbr="2" ybr="2"/>'
    line = '<polyline label="cup" points="0,0;1,1"/>'
    images = "".join(
        f'<image id="{n}" name="{n}.png" width="30" height="20">{inside}</image>'
        for n, inside in enumerate((box, box + box + line, ""))
    )
    (tmp_path / "annotations.xml").write_text(f"<annotations>{images}</annotations>")
    found = understand_folder(tmp_path)
    assert {row["image"] for row in rows_of(found)} == {"0.png", "2.png"}
    assert "2 boxes of images with other annotations that are not read: 1.png" in left_out(found)


def test_labels_beside_images_in_parquet_are_refused_with_the_reason(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": b"x", "path": None}] * 3
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": ["a", "b", "a"]}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"its images are in the table itself, with the label label and no question; "):
        understand_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("rows.jsonl", {"file": "0.png", "label": "{}"}),
        ("rows.jsonl", {"image": "0.png", "question": "What?", "answer": "{}", "split": "train"}),
        ("metadata.jsonl", {"file_name": "0.png", "text": "{}"}),
    ],
)
def test_a_late_row_that_is_no_object_is_named(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    paint(tmp_path / "0.png")
    lines = [json.dumps(row).replace("{}", "ok" if n % 2 else "scratch") for n in range(501)]
    (tmp_path / name).write_text("\n".join([*lines, "[1, 2]"]))
    with pytest.raises(UserError, match=r"line 502: the row is list; it should be an object with named fields"):
        understand_folder(tmp_path)


def test_a_metadata_table_without_file_names_is_a_table(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "metadata.csv").write_text("image,question,answer\na.png,What?,A cat.\nb.png,What?,A dog.\n")
    found = understand_folder(tmp_path)
    assert (found.kind, found.rows, found.converted) == ("a table", 2, None)


def test_a_question_whose_image_fits_several_files_is_left_out(tmp_path: Path) -> None:
    paint(tmp_path / "one" / "7.png", tmp_path / "two" / "7.png", tmp_path / "8.png")
    paint(tmp_path / "train" / "9.png", tmp_path / "val" / "9.png")
    asked = [{"question_id": n, "image_id": n, "question": f"Is it {n}?"} for n in (7, 8, 9)]
    said = [{"question_id": n, "multiple_choice_answer": "yes"} for n in (7, 8, 9)]
    (tmp_path / "train_questions.json").write_text(json.dumps({"questions": asked}))
    (tmp_path / "train_annotations.json").write_text(json.dumps({"annotations": said}))
    found = understand_folder(tmp_path)
    assert [row["image"] for row in rows_of(found)] == ["8.png", "train/9.png"]
    assert "1 question whose image_id fits several files: 7: one/7.png, two/7.png" in left_out(found)


def test_other_images_of_a_sample_and_equal_targets_in_shards(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {"1.depth.png": png("depth"), "1.png": png("one"), "1.txt": "One."}
    for name in ("a+1", "a_1", "A_1"):
        members |= {f"{name}.png": png(name), f"{name}.txt": f"It is {name}."}
    tar(tmp_path / "train.tar", members)
    found = understand_folder(tmp_path)
    assert found.converted is not None
    packed = {each.member: each.target for each in found.converted.packed}
    assert list(packed) == ["1.png", "a+1.png", "a_1.png", "A_1.png"]
    assert packed["1.png"] == "train/1.png"
    assert len({target.lower() for target in packed.values()}) == 4
    assert [row["image"] for row in rows_of(found)] == list(packed.values())
    assert "1 file in shards of type .depth.png, which is not read: 1.depth.png" in left_out(found)


def test_images_of_yolo_with_the_same_name_are_kept_apart_or_left_out(tmp_path: Path) -> None:
    paint(tmp_path / "images" / "train" / "0.png", tmp_path / "train" / "images" / "0.png")
    paint(tmp_path / "images" / "train" / "1.png", tmp_path / "images" / "train" / "1.jpg")
    paint(tmp_path / "images" / "train" / "2.png")
    for n in range(3):
        label = tmp_path / "labels" / "train" / f"{n}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("" if n == 2 else "0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "classes.txt").write_text("cat\n")
    found = understand_folder(tmp_path)
    assert {row["image"] for row in rows_of(found)} == {"images/train/0.png", "images/train/2.png"}
    assert "1 file of labels that fits several images: labels/train/1.txt: " in left_out(found)
    assert "1 image without a label file: train/images/0.png" in left_out(found)


def test_flags_without_effect_are_named(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "rows.csv").write_text("image,question,answer\na.png,What?,A cat.\nb.png,What?,A dog.\n")
    options = FolderOptions(sheet="x", question="Why?", label_is="class", ask=("count",), columns={"answer": "answer"})
    facts = dict(understand_folder(tmp_path, options=options).facts)
    assert facts["without effect"] == "--sheet, --question, --label-is, --ask, since the folder was read as a table"
    assert "without effect" not in dict(understand_folder(tmp_path).facts)
    (tmp_path / "rows.csv").write_text("file,label\na.png,cat\nb.png,dog\na.png,cat\n")
    options = FolderOptions(question="Why?", label_is="class")
    assert "without effect" not in dict(understand_folder(tmp_path, options=options).facts)


@pytest.mark.parametrize("rows", [[{"id": None, "image": None, "images": None}], [{"file": "1.png", "label": ""}] * 3])
def test_a_table_without_any_label_is_one_line(
    tmp_path: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert main(None, ["init", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_captions_asked_of_boxes_are_refused(tmp_path: Path) -> None:
    paint(tmp_path / "images" / "0.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "0.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(
        UserError, match="--ask captions needs COCO captions; YOLO labels has boxes: use --ask presence"
    ):
        understand_folder(tmp_path, options=FolderOptions(ask=("captions",)))


def test_a_workbook_of_recipes_is_no_recipe(tmp_path: Path) -> None:
    names = (
        "recipes.xlsx",
        "recipe.yaml",
        "recipe.yaml.bak",
        "README.de.md",
        "LICENSE",
        "requirements.txt",
        "rows.csv",
    )
    for name in names:
        (tmp_path / name).touch()
    assert [file.name for file in plain_files(tmp_path)] == ["recipes.xlsx", "rows.csv"]


def test_a_misspelt_recipe_is_refused_before_rows_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(tmp_path / "ok" / "a.png", tmp_path / "bad" / "b.png")
    assert main(None, ["init", str(tmp_path), "--recipe", "my_data_qlora.yml"]) == 2
    assert 'no such recipe (did you mean "my_data_qlora.yaml"?)' in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bad", "ok"]
