"""Own data: from a folder of images and a table to a trained adapter and its score on held-out rows."""

from __future__ import annotations

import csv
import io
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.data.folder import understand_folder
from lora_llava.data.formats import Columns
from lora_llava.planning.run_plan import plan_run
from lora_llava.prepare.new_recipe import held_out_rows, init
from lora_llava.recipe import load_recipe
from lora_llava.recipe.io import check_recipe
from lora_llava.training.finetune import finetune


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def image(file: Path) -> None:
    """Write an image that differs from those of other names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 18), (len(file.stem), 90, zlib.crc32(file.stem.encode()) % 256)).save(file)


@pytest.mark.more
def test_the_readme_s_own_data_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the commands of the README's "Your own data", with a shorter Stage 1 and 60 steps of Stage 2."""
    monkeypatch.chdir(tmp_path)
    assert main(None, ["init", "my_images", "--example", "--model", "demo"]) == 0
    output = capsys.readouterr().out
    assert "110 in my_images/questions.csv" in output
    assert "110 rows checked: 0 errors, 0 warnings; nothing is wrong" in output
    assert main(None, ["check", "my_images/recipe.yaml"]) == 0
    assert main(None, ["preview", "my_images/recipe.yaml"]) == 0
    assert Path("preview.html").is_file()
    stage1 = load_recipe("demo_align.yaml", ["training.max_steps=150"])
    finetune(stage1, Path(), console=quiet())
    options = ["training.max_steps=60", f"model.start_from={{stage1_run: {stage1.output_dir}}}"]
    assert main(None, ["finetune", "my_images/recipe.yaml", *options]) == 0
    metrics = json.loads(Path("runs/my_images/metrics.json").read_text())
    before, after = metrics["before"]["all"], metrics["after"]["all"]
    assert before["questions"] == after["questions"] == metrics["data"]["validation"]["used"] == 24
    assert before["exact_match"] == 0
    # None of the images of these 24 rows was trained on.
    assert after["exact_match"] >= 25
    losses = dict(metrics["train"]["loss_curve"]["validation"])
    assert losses[60] < losses[20]
    capsys.readouterr()
    assert main(None, ["evaluate", "runs/my_images", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == metrics["after"]
    held_out = {line["question_id"] for line in _lines(Path("runs/my_images/predictions.jsonl"))}
    plan = plan_run(load_recipe("runs/my_images/recipe.yaml"))
    train = plan.splits["train"]
    assert held_out == {row["row_id"] for row in plan.splits["validation"].rows}
    seen = {name for i in range(len(train.rows)) for name in train.rows.image_files(i)}
    rows = list(csv.DictReader(Path("my_images/questions.csv").read_text().splitlines()))
    assert seen.isdisjoint(rows[int(number)]["image"] for number in held_out)


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_mixture_trains_and_is_reported_by_source(
    stage2_content: dict[str, Any], captions: Path, scienceqa: Path, tmp_path: Path
) -> None:
    table = tmp_path / "facts.tsv"
    table.write_text("question\tanswer\n" + "".join(f"What is {n}?\tIt is {n}.\n" for n in range(30)))
    images = str(captions.parent / "images")
    stage2_content["data"] = {
        "format": "conversations",
        "max_length": 400,
        "system_prompt": "",
        "validation_rows": 6,
        "max_train_rows": 24,
        "sources": [
            {"name": "images", "path": str(captions), "image_folder": images, "weight": 2},
            {"name": "facts", "path": str(table), "weight": 1},
            {"name": "science", "format": "scienceqa", "path": str(scienceqa), "rows": 6},
        ],
    }
    stage2_content["training"] |= {"max_steps": None, "epochs": 2, "batch_size": 4, "eval_every": None}
    stage2_content["training"] |= {"vision_cache": "memory", "workers": 1}
    stage2_content["output_dir"] = str(tmp_path / "mixed")
    recipe = check_recipe(stage2_content, "test")
    stream = io.StringIO()
    metrics = finetune(recipe, Path(), console=Console(file=stream, width=160))
    assert metrics["data"]["train"]["sources"] == {"images": 12, "facts": 6, "science": 6}
    assert metrics["train"]["steps"] == 12
    assert metrics["after"]["all"]["questions"] >= 6
    groups = {group for group in metrics["after"] if not group.startswith("type: ")}
    assert groups <= {"all", "images", "facts", "science"}
    assert "Sources" in stream.getvalue()
    again = plan_run(recipe)
    assert again.order.rows == plan_run(recipe).order.rows
    names = [again.splits["train"].source_of(i).name for row in again.order.rows[:6] for i in row]
    assert {name: names.count(name) for name in set(names)} == {"images": 12, "facts": 6, "science": 6}


def test_sources_share_no_image_across_the_split(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    """A COCO image with different names in two sources is never in both splits."""
    folder = tmp_path / "coco"
    files: dict[str, list[dict[str, Any]]] = {"a": [], "b": []}
    for number in range(12):
        name = f"{number:012d}.jpg"
        image(folder / "train2017" / name)
        for source, shown in (("a", name), ("b", f"COCO_train2014_{name}")):
            turns = [{"from": "human", "value": f"<image>\n{source}?"}, {"from": "gpt", "value": f"{number}"}]
            files[source].append({"id": f"{source}{number}", "image": shown, "conversations": turns})
    for source, rows in files.items():
        (tmp_path / f"{source}.json").write_text(json.dumps(rows))
    stage2_content["evaluation"] = None
    stage2_content["data"] = {
        "format": "conversations",
        "max_length": 400,
        "system_prompt": "",
        "validation_rows": 6,
        "sources": [{"path": str(tmp_path / f"{s}.json"), "image_folder": str(folder)} for s in files],
    }
    plan = plan_run(check_recipe(stage2_content, "test"))
    numbers = {name: {row["row_id"][1:] for row in split.rows} for name, split in plan.splits.items()}
    assert numbers["train"].isdisjoint(numbers["validation"])
    assert len(plan.splits["validation"].rows) == 2 * len(numbers["validation"]) == 6


@pytest.mark.parametrize(
    ("name", "header", "line", "columns", "form"),
    [
        ("table.csv", "image,question,answer", "{}.png,What?,Red", Columns(), "conversations"),
        (
            "t.tsv",
            "file_name\tprompt\tresponse",
            "{}.png\tWhat?\tRed",
            Columns(image="file_name", question="prompt", answer="response"),
            "conversations",
        ),
        ("semi.csv", "path;caption", "pics/{}.png;a red thing", Columns(image="path"), "captions"),
    ],
)
def test_init_understands_tables(
    tmp_path: Path, name: str, header: str, line: str, columns: Columns, form: str
) -> None:
    for number in range(6):
        image(tmp_path / "pics" / f"{number}.png")
    (tmp_path / name).write_text("\n".join([header, *(line.format(number) for number in range(6))]) + "\n")
    found = understand_folder(tmp_path)
    assert (found.columns, found.form, found.rows, found.named, found.images) == (columns, form, 6, 6, 6)
    assert found.image_folder == (tmp_path if "pics/" in line else tmp_path / "pics")


def test_init_writes_a_recipe_with_comments_and_uses_files_named_val_and_test(tmp_path: Path, parts: Path) -> None:
    rows = [{"image": f"{n}.png", "q": "What?", "a": f"Red {n}."} for n in range(8)]
    for number in range(8):
        image(tmp_path / "mine" / "img" / f"{number}.png")
    for name, part in (("train", rows[:5]), ("val", rows[5:7]), ("test", rows[7:])):
        (tmp_path / "mine" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    target, report = init(tmp_path / "mine", model="demo", console=quiet())
    recipe = load_recipe(target)
    assert report.rows == 8
    assert report.errors == []
    assert (recipe.data.columns.question, recipe.data.columns.answer) == ("q", "a")
    assert recipe.data.validation_rows == 0
    assert recipe.data.validation_source is not None
    assert recipe.data.test_source is not None
    assert recipe.data.test_source.path == str(tmp_path / "mine" / "test.jsonl")
    assert recipe.output_dir == "runs/mine"
    text = target.read_text()
    assert text.splitlines()[0] == "# yaml-language-server: $schema=schema.json"
    assert "# the images of the rows" in text
    assert [line for line in text.splitlines() if "columns:" in line or "_source:" in line] != []
    for line in text.splitlines():
        assert "#" in line or line.endswith(":"), line


def test_init_starts_from_a_named_model(tmp_path: Path, stage2: Any) -> None:
    from lora_llava.model.start import prepare_base

    base = prepare_base(stage2.model, 0).name
    for number in range(6):
        image(tmp_path / "mine" / f"{number}.png")
    lines = ["image,question,answer", *(f"{number}.png,What?,It is {number}." for number in range(6))]
    (tmp_path / "mine" / "table.csv").write_text("\n".join(lines))
    target, report = init(tmp_path / "mine", model=base, console=quiet())
    recipe = load_recipe(target)
    assert recipe.model.start_from.llava == base
    assert recipe.model.start_from.llava_revision is None
    assert recipe.data.validation_rows == held_out_rows(6, 6) == 1
    assert {f.kind for f in report.errors} == set()


@pytest.mark.parametrize("template", ["my_data_qlora.yaml", "my_data_8gb.yaml", "demo_my_data_qlora.yaml"])
def test_every_key_of_a_recipe_for_own_data_has_a_comment(template: str) -> None:
    from lora_llava.recipe import find_recipe

    for line in find_recipe(template).read_text().splitlines():
        section = line.rstrip().endswith(":") or line.startswith("#")
        explained = "#" in line
        assert section or explained, line


def test_data_that_init_cannot_read_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    with pytest.raises(UserError, match=r"the folder .* does not exist"):
        understand_folder(folder)
    image(folder / "a.png")
    with pytest.raises(UserError, match="has no table and no JSON; add a CSV"):
        understand_folder(folder)
    (folder / "one.csv").write_text("x,y\n1,2\n")
    with pytest.raises(UserError, match=r"its columns are x, y; rename them to image, question, answer"):
        understand_folder(folder)
    (folder / "two.csv").write_text("image,question,answer\nb.png,q,a\n")
    with pytest.raises(UserError, match=r"has 2 possible files of rows: one\.csv, two\.csv; name one with --data"):
        understand_folder(folder)
    with pytest.raises(UserError, match=r"none of its first 1 images is under .*, which has 1 images"):
        understand_folder(folder, folder / "two.csv")
    (folder / "two.csv").write_text("image,question,answer\na.png,q,a\n")
    shutil.copy(folder / "two.csv", folder / "recipe.yaml")
    with pytest.raises(UserError, match=r"recipe\.yaml exists already"):
        init(folder, data=folder / "two.csv", model="demo", console=quiet())


def test_the_example_does_not_overwrite_files(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        init(tmp_path / "mine", example=True, model="demo", console=quiet())


def test_with_too_few_rows_none_are_held_out(tmp_path: Path) -> None:
    assert [held_out_rows(*counts) for counts in ((1, 0), (9, 1), (2, 2), (199, 50), (200, 50), (99_999, 9))] == [
        0,
        0,
        1,
        39,
        20,
        1000,
    ]
    image(tmp_path / "mine" / "a.png")
    (tmp_path / "mine" / "table.csv").write_text("image,question,answer\na.png,What?,Red.\na.png,Why?,So.\n")
    target, report = init(tmp_path / "mine", model="demo", console=quiet())
    recipe = load_recipe(target)
    assert (recipe.data.validation_rows, recipe.evaluation, report.errors) == (0, None, [])
