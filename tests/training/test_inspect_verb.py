"""`lora-llava inspect`: its files, other data, bad images, a stop and its resumption, and planted faults."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from lora_llava.commands.main import main
from lora_llava.data.conversation import Turn
from lora_llava.evaluation.inspection import inspection
from lora_llava.evaluation.inspection.inspected_rows import open_inspection
from lora_llava.recipe.io import check_recipe
from lora_llava.training.finetune import finetune
from tests.own_rows import asked, drawn, written
from tests.planted_rows import write_planted


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "inspect.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def trained(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run over rows of its own, two of them without an image and two of the same pixels."""
    folder = tmp_path_factory.mktemp("inspected")
    images = drawn(folder / "images", 12)
    shutil.copy(images / "3.png", images / "again.png")
    rows = [asked(n, f"{n % 12}.png", ("Yes.", "No.")[n % 2]) for n in range(26)]
    rows += [asked(26, "again.png"), asked(27), asked(28)]
    content: dict[str, Any] = {
        "stage": 2,
        "output_dir": str(folder / "run"),
        "model": {
            "llm": str(parts / "llm"),
            "vision_tower": str(parts / "vision_tower"),
            "start_from": {"untrained": True},
        },
        "lora": {"r": 4, "alpha": 32},
        "data": {
            "format": "conversations",
            "path": written(folder / "rows.json", rows),
            "image_folder": str(images),
            "validation_rows": 6,
            "max_length": 400,
            "system_prompt": "",
        },
        "training": {"batch_size": 8, "learning_rate": 1e-3, "max_steps": 2, "log_every": 1},
    }
    finetune(check_recipe(content, "test"), Path(), console=Console(file=io.StringIO(), width=160))
    return folder


def test_a_run_s_rows_with_their_splits(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(None, ["inspect", str(trained / "run"), "--output", str(tmp_path)]) == 0
    found = table(tmp_path)
    assert sorted(int(row["row_id"][1:]) for row in found) == list(range(29))
    assert {row["split"] for row in found} == {"train", "validation"}
    held_out = {row["row_id"] for row in found if row["split"] == "validation"}
    opened = open_inspection(str(trained / "run"))
    assert held_out == {row["row_id"] for row in opened.splits["validation"].rows}
    by_id = {row["row_id"]: row for row in found}
    for number in range(27):
        row = by_id[f"r{number}"]
        own, other, none = (float(row[f"loss_{name}_image"]) for name in ("with", "shuffled", "without"))
        assert min(own, other, none) > 0
        assert float(row["gain_over_shuffled"]) == pytest.approx(other - own, abs=2e-4)
        assert row["gains_nothing"] == ("yes" if other - own <= inspection.GAIN_MARGIN else "no")
    assert by_id["r27"]["images"] == by_id["r27"]["loss_shuffled_image"] == by_id["r27"]["gains_nothing"] == ""
    assert "again.png" in by_id["r3"]["near_duplicates"]
    ranks = sorted(int(row["surprise_rank"]) for row in found)
    assert ranks == list(range(1, 30))
    page = (tmp_path / "inspect.html").read_text(encoding="utf-8")
    assert page.count("<h2>") == 3
    output = capsys.readouterr().out
    assert "inspect.csv: the figures of every row" in output
    assert not list(tmp_path.glob("*.partial"))


def test_other_data_with_a_bad_image(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "meine bilder"
    images.mkdir()
    for name in ("Öl.PNG", "b.png"):
        Image.new("RGB", (20, 20), (len(name) * 20, 9, 9)).save(images / name)
    lines = ["Bild;Frage;Antwort", "Öl.PNG;Was?;ja", "missing.png;Was?;nein", 'b.png;"a, ""b""?";ja']
    (tmp_path / "mehr.csv").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    options = ["--data", str(tmp_path / "mehr.csv"), "--image-folder", str(images), "--output", str(tmp_path / "out")]
    assert main(None, ["inspect", str(trained / "run"), *options]) == 0
    found = table(tmp_path / "out")
    assert [(row["split"], row["question"], row["answer"]) for row in found] == [
        ("data", "Was?", "ja"),
        ("data", "Was?", "nein"),
        ("data", 'a, "b"?', "ja"),
    ]
    assert [bool(row["problem"]) for row in found] == [False, True, False]
    assert "image missing.png is missing" in found[1]["problem"]
    assert "not measured: mehr.csv, line 3: image missing.png is missing" in capsys.readouterr().out


def test_a_stopped_inspection_resumes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspection, "_PART", 8)
    command = ["inspect", str(trained / "run"), "--output"]
    assert main(None, [*command, str(tmp_path / "whole")]) == 0
    measured: list[int] = []
    whole = inspection.measure_rows

    def stopped(evaluator: Any, rows: Any, seed: int, batches: Any) -> Any:
        measured.append(seed)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return whole(evaluator, rows, seed, batches)

    monkeypatch.setattr(inspection, "measure_rows", stopped)
    capsys.readouterr()
    assert main(None, [*command, str(tmp_path / "stopped")]) == 130
    assert "run the same command to resume" in capsys.readouterr().err
    assert main(None, [*command, str(tmp_path / "stopped")]) == 0
    assert measured == [0, 1, 1, 2]
    for name in ("inspect.csv", "inspect.html"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-folder", "x"], "--image-folder needs --data"),
        (["--data", "no.csv"], "no.csv is missing; it should be a file"),
        (["--data", "{rows}", "--image-folder", "no"], "--image-folder: no does not exist; name the root folder"),
    ],
)
def test_mistakes(options: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [text.format(rows=trained / "rows.json") for text in options]
    assert main(None, ["inspect", str(trained / "run"), *given]) == 2
    assert message in capsys.readouterr().err


def test_limit_draws_rows_of_all_splits(trained: Path) -> None:
    rows = open_inspection(str(trained / "run")).read(9)
    assert len(rows) == 9
    assert all(isinstance(each.row.turns[0], Turn) for each in rows)


@pytest.mark.more
@pytest.mark.slow
def test_planted_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swapped answers and swapped images on the demo's world; Stage 1 and Stage 2 are shortened."""
    monkeypatch.chdir(tmp_path)
    planted = write_planted(tmp_path / "mine", 600, labels=0.05, images=0.05)
    quiet = Console(file=io.StringIO(), width=160)
    from lora_llava.recipe import load_recipe

    stage1 = load_recipe("demo_align.yaml", ["training.max_steps=400"])
    finetune(stage1, Path(), console=quiet)
    options = [
        f"data.path={tmp_path}/mine/questions.csv",
        f"data.image_folder={tmp_path}/mine/images",
        f"model.start_from={{stage1_run: {stage1.output_dir}}}",
        "data.validation_rows=60",
        "training.epochs=12",
        "evaluation.before=0",
        "evaluation.after=0",
    ]
    finetune(load_recipe("demo_my_data_qlora.yaml", options), Path(), console=quiet)
    assert main(None, ["inspect", "runs/my_data"]) == 0
    found = sorted(table(tmp_path / "runs" / "my_data"), key=lambda row: int(row["surprise_rank"]))
    faulty = [planted[int(row["row_id"])].fault for row in found]
    count = sum(map(bool, faulty))
    assert sum(map(bool, faulty[:count])) >= 0.6 * count
