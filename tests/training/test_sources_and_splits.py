"""Sources as a run takes them: names apart, images in tables, mixtures of what can be used, data that changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.data.folder import understand_folder
from lora_llava.data.images import image_check as image_check
from lora_llava.data.images.image_id import ImageId
from lora_llava.data.images.image_sources import FolderImages, TableImages
from lora_llava.data.images.image_tables import open_table
from lora_llava.data.sources import _light_rows, list_source, open_source
from lora_llava.evaluation.evaluate import evaluate
from lora_llava.planning.run_plan import plan_run
from lora_llava.prepare.row_check import check
from lora_llava.prepare.sample_preview import preview
from lora_llava.recipe.io import check_recipe
from lora_llava.splits.encoded_sources import inspect_split
from lora_llava.training.finetune import finetune
from tests.own_rows import asked, drawn, quiet, stored, written
from tests.training.conftest import Plan


def test_a_table_s_own_image_is_one_image(tmp_path: Path) -> None:
    file = stored(tmp_path, 3, 1)
    source = open_source(file)
    rows = list(source.read())
    assert [row.images for row in rows] == [("0",), ("1",), ("2",)]  # type: ignore[union-attr]
    assert source.images.open("2").getpixel((0, 0)) == (14, 90, 30)
    light = list(_light_rows(open_table(str(file), "train", None)))
    assert light[1] == {"image": [{"path": None}], "question": "Is it 0?", "answer": "1"}


def test_lists_of_images_are_counted_without_their_bytes(tmp_path: Path) -> None:
    content = (drawn(tmp_path / "drawn", 1) / "0.png").read_bytes()
    image = {"bytes": content, "path": None}
    table = datasets.Dataset.from_list([{"images": [image, image]}, {"images": []}, {"images": None}])
    table = table.cast_column("images", datasets.List(datasets.Image(decode=False)))
    assert [row["images"] for row in _light_rows(table)] == [[{"path": None}] * 2, [], []]


def test_rows_of_one_stored_image_are_held_out_together(plan: Plan, tmp_path: Path) -> None:
    found = plan(path=str(stored(tmp_path, 8, 4)), validation_rows=8)
    numbers = {
        name: {split.read([i])[0].turns[-1].text for i in range(len(split.rows))}
        for name, split in found.splits.items()
    }
    assert numbers["train"].isdisjoint(numbers["validation"])
    assert len(found.splits["validation"].rows) == 8


def test_files_of_one_name_are_distinguished_and_each_is_fixed_by_itself(
    stage2_content: dict[str, Any], tmp_path: Path
) -> None:
    first = written(tmp_path / "a" / "train.json", [asked(n, answer="" if n == 1 else "Yes.") for n in range(4)])
    second = written(tmp_path / "b" / "train.json", [asked(n, answer="" if n == 12 else "No.") for n in range(10, 14)])
    stage2_content["evaluation"] = None
    stage2_content["data"] = {
        "format": "conversations",
        "sources": [{"path": first}, {"path": second}],
        "system_prompt": "",
    }
    report = check(check_recipe(stage2_content, "test"), fix=True, console=quiet())
    assert [(f.source, f.row) for f in report.errors] == [("train", "r1"), ("train (2)", "r12")]
    assert report.splits["train"]["sources"] == {"train": 4, "train (2)": 4}
    fixed = {
        name: [row["id"] for row in json.loads((tmp_path / name / "train.fixed.json").read_text())] for name in "ab"
    }
    assert fixed == {"a": ["r0", "r2", "r3"], "b": ["r10", "r11", "r13"]}


def test_a_mixture_counts_the_rows_that_can_be_used(plan: Plan, tmp_path: Path) -> None:
    half = [asked(n, answer="" if n % 2 else "Yes.") for n in range(20)]
    sources = [
        {"name": "half", "path": written(tmp_path / "half.json", half), "rows": 10},
        {"name": "whole", "path": written(tmp_path / "whole.json", [asked(n) for n in range(30, 36)])},
    ]
    found = plan({"epochs": 1, "max_steps": None}, sources=sources, on_bad_row="drop").splits["train"]
    assert found.epochs is not None
    assert len(set(found.epochs(0))) == 16
    assert found.report.sources == {"half": 10, "whole": 6}
    assert found.report.dropped == {"empty answer": 10}
    sources[1]["path"] = written(tmp_path / "none.json", [asked(50, answer=" ")])
    with pytest.raises(UserError, match=r"data\.sources: whole has no usable row"):
        plan(sources=sources, on_bad_row="drop")


def test_what_an_epoch_leaves_out_is_counted_or_comes_later(plan: Plan, tmp_path: Path) -> None:
    images = drawn(tmp_path / "images", 12)
    rows = [asked(n, f"{n}.png" if n < 12 else None) for n in range(30)]
    sources = [{"path": written(tmp_path / "rows.json", rows), "image_folder": str(images), "rows": 10}]
    once = plan({"epochs": 1, "max_steps": None}, sources=sources).splits["train"]
    assert (len(once.rows), once.report.dropped) == (10, {"not drawn": 20})
    thrice = plan({"epochs": 3, "max_steps": None}, sources=sources).splits["train"]
    assert (len(thrice.rows), thrice.report.dropped) == (30, {})


def test_images_that_check_has_seen_are_not_opened_again(
    plan: Plan, stage2_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_LLAVA_CACHE", str(tmp_path / "cache"))  # other tests look at images of the same content
    opened: list[str] = []
    inspect = image_check.inspect_image
    monkeypatch.setattr(image_check, "inspect_image", lambda images, name: opened.append(name) or inspect(images, name))
    images = drawn(tmp_path / "images", 6)
    sources = [
        {"path": written(tmp_path / "a.json", [asked(n, f"{n}.png") for n in range(6)]), "image_folder": str(images)},
        {"path": str(stored(tmp_path / "stored", 3, 2))},
    ]
    stage2_content["evaluation"] = None
    stage2_content["data"] = {"format": "conversations", "sources": sources, "max_length": 300, "system_prompt": ""}
    check(check_recipe(stage2_content, "test"), console=quiet())
    assert len(opened) == 12
    plan(sources=sources)
    assert len(opened) == 12


def test_a_preview_leaves_out_what_the_run_leaves_out(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    images = drawn(tmp_path / "images", 6)
    rows = [asked(n, f"{n}.png") for n in range(8)]  # two have no image there
    stage2_content["evaluation"] = None
    stage2_content["training"] |= {"max_steps": None, "epochs": 1}
    stage2_content["data"] = {
        "format": "conversations",
        "path": written(tmp_path / "rows.json", rows),
        "image_folder": str(images),
        "on_bad_image": "drop",
        "system_prompt": "",
        "max_length": 300,
    }
    recipe = check_recipe(stage2_content, "test")
    shown = preview(recipe, name="test", output=None, console=quiet())
    order = plan_run(recipe)
    names = [order.splits["train"].rows[i]["row_id"] for row in order.order.rows for i in row]
    assert [sample.row_id for sample in shown.samples] == names
    report = check(recipe, console=quiet())
    assert (len(report.errors), [f.kind for f in report.warnings]) == (0, ["missing image"] * 2)


def test_data_that_changed_is_neither_resumed_nor_asked(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    rows = [asked(n) for n in range(40)]
    file = written(tmp_path / "rows.json", rows)
    stage2_content["evaluation"] = {"max_new_tokens": 2, "before": 0}
    stage2_content["data"] = {
        "format": "conversations",
        "path": file,
        "validation_rows": 6,
        "test_rows": 4,
        "max_length": 300,
    }
    recipe = check_recipe(stage2_content, "test")
    metrics = finetune(recipe, Path(), console=quiet())
    run = recipe.output_dir
    assert metrics["after"]["all"]["questions"] == 4
    assert evaluate(run) == metrics["after"]
    written(tmp_path / "rows.json", [*rows, asked(99)])
    with pytest.raises(UserError, match="the data has changed since training"):
        evaluate(run)
    own = written(tmp_path / "own.json", [asked(200), asked(201)])
    assert evaluate(run, overrides=["data.test_rows=0", f"data.test_source={{path: {own}}}"])["all"]["questions"] == 2
    (Path(run) / "run.json").unlink()
    with pytest.raises(UserError, match="--resume: the training rows are not those"):
        finetune(recipe, Path(), resume=True, console=quiet())


def test_test_rows_are_held_out_without_an_evaluation(plan: Plan, tmp_path: Path) -> None:
    file = written(tmp_path / "rows.json", [asked(n) for n in range(40)])
    found = plan(path=file, validation_rows=5, test_rows=7)
    assert {name: len(split.rows) for name, split in found.splits.items()} == {"train": 28, "validation": 5}


def test_other_files_are_not_overwritten(
    stage2_content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(written(tmp_path / "rows.json", [asked(n) for n in range(6)]))
    stage2_content["evaluation"] = None
    stage2_content["data"] = {"format": "conversations", "path": str(file), "max_length": 300}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(stage2_content))
    before = [file.read_text(), recipe.read_text()]
    assert main(None, ["check", str(recipe), "--json", str(file)]) == 2
    assert main(None, ["check", str(recipe), "--json", str(recipe)]) == 2
    assert main(None, ["preview", str(recipe), "--output", str(file)]) == 2
    assert main(None, ["preview", str(recipe), "--output", str(tmp_path)]) == 2
    assert [file.read_text(), recipe.read_text()] == before
    for _ in range(2):
        assert main(None, ["check", str(recipe), "--json", str(tmp_path / "report.json")]) == 0
        assert main(None, ["preview", str(recipe), "--output", str(tmp_path / "page.html")]) == 0
    reported = capsys.readouterr().err
    assert "exists and is not a report of a check" in reported
    assert "Traceback" not in reported


@pytest.mark.parametrize(
    ("header", "line", "kind", "data"),
    [
        ("image,question,answer\n", "", "no rows", {}),
        ("img,question,answer\n", "a.png,Is it?,Yes.\n", "no images", {"image_folder": "."}),
        ("image,question,answer\n", ",Is it?,Yes.\n", "no images", {"image_folder": "."}),
    ],
)
def test_what_a_run_would_refuse_or_be_blind_to_is_an_error(
    stage2_content: dict[str, Any], tmp_path: Path, header: str, line: str, kind: str, data: dict[str, str]
) -> None:
    (tmp_path / "rows.csv").write_text(header + line)
    stage2_content["evaluation"] = None
    data = {name: str(tmp_path) for name in data}
    stage2_content["data"] = {"format": "conversations", "path": str(tmp_path / "rows.csv"), "max_length": 300, **data}
    report = check(check_recipe(stage2_content, "test"), console=quiet())
    assert [finding.kind for finding in report.errors] == [kind]


def test_a_fixed_table_keeps_its_line_ends_its_mark_and_its_values(
    stage2_content: dict[str, Any], tmp_path: Path
) -> None:
    content = '\ufeffquestion;answer;note\r\n"Über; was?";"Ein ""Wort""";1\r\nLeer?;;2\r\n"zwei\nZeilen?";Ja;\r\n'
    file = tmp_path / "rows.csv"
    file.write_bytes(content.encode())
    stage2_content["evaluation"] = None
    stage2_content["data"] = {"format": "conversations", "path": str(file), "max_length": 300}
    check(check_recipe(stage2_content, "test"), fix=True, console=quiet())
    assert (tmp_path / "rows.fixed.csv").read_bytes() == content.replace("Leer?;;2\r\n", "").encode()


def test_init_takes_images_from_the_table_and_names_what_it_does_not_read(tmp_path: Path) -> None:
    file = stored(tmp_path / "mine", 4, 2)
    found = understand_folder(tmp_path / "mine")
    assert (found.file, found.embedded, found.image_folder, found.rows) == (file, True, None, 8)
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "a.csv").write_text("Question,Answer,choices,category\nWhat?,Yes,a b,x\nWhy?,No,c,y\n")
    found = understand_folder(tmp_path / "table")
    assert (found.columns.question, found.columns.answer, found.unused) == ("Question", "Answer", ("choices",))
    assert ("for the score", "category") in found.facts
    (tmp_path / "alpaca").mkdir()
    written(tmp_path / "alpaca" / "a.json", [{"instruction": "Add.", "input": "1 and 2", "output": "3"}])
    with pytest.raises(UserError, match="join the two into one column question"):
        understand_folder(tmp_path / "alpaca")


def test_a_typing_slip_in_a_source_is_one_line(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    stage2_content["evaluation"] = None
    stage2_content["data"] = {"format": "conversations", "sources": [{"path": "a.json", "wieght": 2}]}
    with pytest.raises(UserError) as caught:
        check_recipe(stage2_content, "r.yaml")
    assert str(caught.value) == ('r.yaml: data.sources.0.wieght is not a key of a recipe (did you mean "weight"?)')
    file = tmp_path / "r.yaml"
    stage2_content["data"]["sources"] = [{"path": "a.json"}, {"path": "b.json"}]
    file.write_text(json.dumps(stage2_content))
    from lora_llava.recipe import load_recipe

    changed = load_recipe(file, ["data.sources.1.weight=2.5", "data.sources.0.weight=1.0"])
    assert [source.weight for source in changed.data.train_sources()] == [1.0, 2.5]
    with pytest.raises(UserError, match=r"override 'data\.sources\.7\.weight=1': 7 is not a section"):
        load_recipe(file, ["data.sources.7.weight=1"])


def test_images_of_several_sources_are_looked_at_by_their_own_source_s_rules(tmp_path: Path) -> None:
    folders = [drawn(tmp_path / str(number), number + 1) for number in range(3)]
    images = [FolderImages(folder, limit) for folder, limit in zip(folders, (400, 399, 400), strict=True)]
    table = TableImages([{"image": {"bytes": (folders[0] / "0.png").read_bytes()}}, {"image": None}], 400)
    sources = [list_source(str(n), [], each) for n, each in enumerate([*images, table])]
    names = [
        ImageId(0, "0.png"),
        ImageId(1, "0.png"),
        ImageId(2, "2.png"),
        ImageId(2, "b.png"),
        ImageId(3, "0"),
        ImageId(3, "1"),
    ]
    found = inspect_split(sources, names)
    assert {name: found[name].problem for name in names} == {
        ImageId(0, "0.png"): None,
        ImageId(1, "0.png"): "image 0.png has 20 x 20 pixels, over max_image_pixels 399",
        ImageId(2, "2.png"): None,
        ImageId(2, "b.png"): "image b.png is missing",
        ImageId(3, "0"): None,
        ImageId(3, "1"): "image of row 1 is missing",
    }
    assert found[ImageId(0, "0.png")].digest == found[ImageId(3, "0")].digest != found[ImageId(2, "2.png")].digest
