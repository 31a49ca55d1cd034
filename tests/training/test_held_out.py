"""The rows of an epoch, held-out rows, and the data of a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from lora_llava.core.errors import UserError
from lora_llava.data.files.cleaned_copy import write_without
from lora_llava.evaluation.evaluate import evaluate
from lora_llava.planning.run_plan import plan_run
from lora_llava.prepare.row_check import check
from lora_llava.recipe.io import check_recipe
from lora_llava.runs.directory import start_run
from lora_llava.training.finetune import finetune
from tests.own_rows import asked, drawn, quiet, written
from tests.training.conftest import Plan


def test_a_weighted_epoch_is_as_long_as_its_sources(plan: Plan, tmp_path: Path) -> None:
    sources = [
        {"path": written(tmp_path / "a.json", [asked(n) for n in range(20)]), "weight": 1.0},
        {"path": written(tmp_path / "b.json", [asked(n) for n in range(30, 34)]), "weight": 1.0},
    ]
    for epochs, distinct in ((1, 16), (2, 24)):
        found = plan({"epochs": epochs, "max_steps": None, "batch_size": 4}, sources=sources)
        train = found.splits["train"]
        assert (train.report.sources, len(train.rows)) == ({"a": 12, "b": 12}, distinct)
        assert found.order.steps == 6 * epochs
        assert {i for row in found.order.rows for i in row} == set(range(distinct))


def test_only_rows_with_bad_images_leave_an_epoch(plan: Plan, tmp_path: Path) -> None:
    images = drawn(tmp_path / "images", 18)
    rows = [asked(n, f"{n}.png") for n in range(20)]
    sources = [{"path": written(tmp_path / "a.json", rows), "image_folder": str(images), "rows": 20}]
    train = plan({"epochs": 1, "max_steps": None}, sources=sources, on_bad_image="drop").splits["train"]
    assert train.epochs is not None
    assert sorted(train.epochs(0)) == list(range(18))
    assert train.report.dropped == {"bad image": 2}


def test_a_source_may_be_missing_from_a_split(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(40)))
    images = drawn(tmp_path / "images", 2)
    few = "".join(f"{n}.png,Is it {n}?,Yes.\n" for n in range(2))
    (tmp_path / "b.csv").write_text("image,question,answer\n" + few)
    stage2_content["evaluation"] = None
    sources = [{"path": str(tmp_path / "a.csv")}, {"path": str(tmp_path / "b.csv"), "image_folder": str(images)}]
    for seed in range(4):
        stage2_content["data"] = {
            "format": "conversations",
            "sources": sources,
            "validation_rows": 5,
            "max_length": 300,
        }
        report = check(check_recipe(stage2_content | {"seed": seed}, "test"), console=quiet())
        assert (report.errors, report.warnings) == ([], [])


def test_rows_with_the_same_question_or_image_are_held_out_together(
    stage2_content: dict[str, Any], tmp_path: Path
) -> None:
    images = drawn(tmp_path / "images", 10)
    rows = [asked(n % 10, f"{n % 10}.png", f"{n}") | {"id": str(n)} for n in range(10)]
    for n in range(10):
        (images / f"copy{n}.png").write_bytes((images / f"{n}.png").read_bytes())
        rows.append(asked(n, f"copy{n}.png", f"again {n}") | {"id": f"copy{n}"})
    rows += [asked(100 + n % 3, None, f"joke {n}") | {"id": f"joke{n}"} for n in range(12)]
    stage2_content["evaluation"] = None
    for seed in range(5):
        stage2_content["data"] = {
            "format": "conversations",
            "path": written(tmp_path / "rows.json", rows),
            "image_folder": str(images),
            "validation_rows": 6,
            "max_length": 300,
        }
        report = check(check_recipe(stage2_content | {"seed": seed}, "test"), console=quiet())
        assert (report.errors, report.warnings) == ([], [])


def test_a_column_of_raw_images_is_read(plan: Plan, tmp_path: Path) -> None:
    images = drawn(tmp_path / "images", 6)
    table = pyarrow.table(
        {
            "image": [(images / f"{n}.png").read_bytes() for n in range(6)],
            "question": [f"Is it {n}?" for n in range(6)],
            "answer": ["Yes."] * 6,
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "raw.parquet")
    train = plan(path=str(tmp_path / "raw.parquet")).splits["train"]
    assert [train.rows.image_files(i) for i in range(6)] == [[str(n)] for n in range(6)]
    assert train.images.open("4").getpixel((0, 0)) == (28, 90, 30)


def test_complete_batches_of_a_parquet_file_can_be_removed(tmp_path: Path) -> None:
    rows = {"question": [f"{n}?" for n in range(600)], "answer": ["x"] * 600}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet")
    target, count = write_without(tmp_path / "rows.parquet", set(range(300)))
    assert count == 300
    assert pyarrow.parquet.read_table(target)["question"].to_pylist() == rows["question"][300:]


def test_a_separate_test_source_needs_no_training_data(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    train = Path(written(tmp_path / "train.json", [asked(n) for n in range(8)]))
    held = written(tmp_path / "held.json", [asked(n) for n in range(20, 23)])
    stage2_content["evaluation"] = {"max_new_tokens": 2, "before": 0}
    stage2_content["data"] = {
        "format": "conversations",
        "path": str(train),
        "test_source": {"path": held},
        "max_length": 300,
    }
    recipe = check_recipe(stage2_content, "test")
    metrics = finetune(recipe, Path(), console=quiet())
    train.unlink()
    assert evaluate(recipe.output_dir) == metrics["after"]
    stage2_content["data"]["test_source"]["path"] = str(tmp_path / "gone.json")
    stage2_content["data"]["path"] = held
    with pytest.raises(UserError, match=r"data\.test_source\.path: .*gone\.json is missing"):
        plan_run(check_recipe(stage2_content, "test"))


def test_a_checkpoint_of_other_rows_is_not_resumed(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    stage2_content["evaluation"] = None
    stage2_content["data"] = {
        "format": "conversations",
        "path": written(tmp_path / "rows.json", [asked(n) for n in range(40)]),
        "validation_rows": 4,
        "max_length": 300,
    }
    recipe = check_recipe(stage2_content, "test")
    finetune(recipe, Path(), console=quiet())
    (Path(recipe.output_dir) / "run.json").unlink()
    stage2_content["data"]["validation_rows"] = 9
    other = check_recipe(stage2_content, "test")
    start_run(Path(other.output_dir), other, {"train": "begun anew, and killed"})
    with pytest.raises(
        UserError, match=r"--resume: the recipe differs from that of step 4: data.validation_rows was 4 and is 9"
    ):
        finetune(other, Path(), resume=True, console=quiet())
