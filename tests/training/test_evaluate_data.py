"""`lora-llava evaluate RUN --data FILE`: all rows of any file, which of them were trained, and files of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_llava import evaluate
from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.data.images.image_check import pixel_hash
from tests.own_rows import asked, stored, written
from tests.training.continued import first_run, painted, saved


@pytest.fixture(scope="module")
def trained(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_run(tmp_path_factory.mktemp("trained"), parts)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def results(run: Path) -> list[str]:
    return sorted(file.name for file in run.glob("evaluation*.json"))


def table_of(capsys: Any) -> tuple[dict[str, Any], str]:
    found = capsys.readouterr()
    return json.loads(found.out), found.err


def new_rows(folder: Path, count: int = 6) -> list[dict[str, Any]]:
    """Rows with images that the run has not seen."""
    return [asked(n, saved(n, folder / "images" / f"{n}.png")) for n in range(300, 300 + count)]


def tabled(rows: list[dict[str, Any]], between: str, names: str = "image,question,answer") -> str:
    lines = [names.replace(",", between)]
    for row in rows:
        question = row["conversations"][0]["value"].removeprefix("<image>\n")
        lines.append(between.join([row.get("image", ""), question, "Yes."]))
    return "\n".join(lines) + "\n"


FORMS = {
    "test.csv": lambda rows: tabled(rows, ","),
    "TEST SET é.TSV": lambda rows: "\ufeff" + tabled(rows, "\t"),
    "other.csv": lambda rows: tabled(rows, ",", "file_name,prompt,response"),
    "list.json": json.dumps,
    "lines.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "messages.jsonl": lambda rows: "".join(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"Is it {row['id'][1:]}?"},
                    {"role": "assistant", "content": "Yes."},
                ],
                "images": [row["image"]],
            }
        )
        + "\n"
        for row in rows
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_all_rows_of_every_form_are_asked(name: str, run: Path, tmp_path: Path, capsys: Any) -> None:
    rows = new_rows(tmp_path)
    (tmp_path / name).write_text(FORMS[name](rows), encoding="utf-8")
    assert main("evaluate", [str(run), "--data", str(tmp_path / name), "--json"]) == 0
    table, errors = table_of(capsys)
    assert table["all"]["questions"] == 6
    assert f"asking 6 of 6 rows of {name}" in errors
    assert "trained by" not in errors
    (file,) = results(run)
    stem = Path(name).stem.replace(" ", "_")
    assert file.startswith(f"evaluation_{stem}_")
    about = json.loads((run / file).read_text())["asked"]
    assert about["data_file"]["path"] == str(tmp_path / name)
    assert (about["data_file"]["rows"], about["data_file"]["asked"]) == (6, 6)
    assert about["trained"] == {"rows": 6, "same_row": 0, "same_image": 0, "warning": ""}
    predictions = [
        json.loads(line)
        for line in (run / file.replace("evaluation", "predictions").replace(".json", ".jsonl"))
        .read_text()
        .splitlines()
    ]
    assert [line["question"] for line in predictions] == [f"Is it {n}?" for n in range(300, 306)]


def test_parquet_with_images_and_rows_without_one(run: Path, tmp_path: Path, capsys: Any) -> None:
    table = stored(tmp_path / "stored", 3, 2)
    assert main("evaluate", [str(run), "--data", str(table), "--json"]) == 0
    assert table_of(capsys)[0]["all"]["questions"] == 6
    (tmp_path / "plain.csv").write_text("question,answer\nIs it 900?,Yes.\nIs it 901?,No.\n")
    assert main("evaluate", [str(run), "--data", str(tmp_path / "plain.csv"), "--json"]) == 0
    assert table_of(capsys)[0]["all"]["questions"] == 2
    assert len(results(run)) == 2


def test_a_folder_with_a_test_file_is_asked(run: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "folder"
    rows = new_rows(folder)
    written(folder / "train.json", rows[:4])
    written(folder / "test.json", rows[4:])
    assert main("evaluate", [str(run), "--data", str(folder), "--json"]) == 0
    table, errors = table_of(capsys)
    assert (table["all"]["questions"], "asking 2 of 2 rows of folder" in errors) == (2, True)


def test_scienceqa_is_asked_of_a_run_over_own_rows(run: Path, scienceqa: Path, capsys: Any) -> None:
    assert main("evaluate", [str(run), "--data", str(scienceqa / "problems.json"), "--json"]) == 0
    assert table_of(capsys)[0]["AVG"][2] == 6


def test_a_limit_and_the_api_agree_with_the_verb(run: Path, tmp_path: Path, capsys: Any) -> None:
    file = written(tmp_path / "test.json", new_rows(tmp_path))
    assert main("evaluate", [str(run), "--data", file, "--limit", "4", "--json"]) == 0
    table, errors = table_of(capsys)
    assert "asking 4 of 6 rows of test.json" in errors
    assert evaluate(run, data=file, limit=4, quiet=True) == table
    assert main("evaluate", [str(run), "--data", file, "--json"]) == 0
    whole = table_of(capsys)[0]
    assert evaluate(run, data=file, images=tmp_path / "images", quiet=True) == whole
    assert len(results(run)) == 2


def test_trained_rows_are_counted_by_content(run: Path, trained: Path, tmp_path: Path, capsys: Any) -> None:
    """Renamed and re-encoded images are found; the rows that the run held out are not trained ones."""
    seen = json.loads((trained / "run" / "seen_rows.json").read_text())["own"]["splits"]["train"]
    assert len(seen["rows"]) == 16 * 16
    known = next(n for n in range(20) if pixel_hash(painted(n)) in seen["keys"])
    rows = [asked(n, saved(n, tmp_path / "images" / f"copy{n}.bmp")) for n in range(20)]
    other = asked(500, saved(known, tmp_path / "images" / "x.tiff"))
    file = written(tmp_path / "again.json", [*rows, *(asked(n) for n in range(20, 24)), *new_rows(tmp_path, 2)])
    assert main("evaluate", [str(run), "--data", file, "--json"]) == 0
    expected = f"warning: 16 of 26 rows are in the training data of {run}: 16 with the same question; their scores do "
    assert f"{expected}not show how it does on new images\n" in table_of(capsys)[1]
    file = written(tmp_path / "other.json", [other])
    assert main("evaluate", [str(run), "--data", file, "--bad-images", "wrong", "--json"]) == 0
    errors = table_of(capsys)[1]
    assert ": 1 of 1 rows is in the training data of" in errors
    assert "1 with the same image and another question" in errors


def test_another_data_path_says_what_is_asked(run: Path, tmp_path: Path, capsys: Any) -> None:
    file = written(tmp_path / "new.json", new_rows(tmp_path, 12))
    assert main("evaluate", [str(run), f"data.path={file}", f"data.image_folder={tmp_path}/images", "--json"]) == 0
    table, errors = table_of(capsys)
    assert table["all"]["questions"] == 5
    assert (
        f"warning: data.path={file}: asking 5 of 12 rows, those that data.test_rows=5 holds out of them; to ask all "
        f"12, use --data {file}"
    ) in errors
    assert main("evaluate", [str(run), "--json"]) == 0
    assert "asking 5 of 5 held-out rows (test)" in capsys.readouterr().err


def test_a_complete_llava_without_a_recipe(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert main("merge", [str(run), "--output", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    (tmp_path / "merged" / "recipe.yaml").unlink()
    file = written(tmp_path / "test.json", new_rows(tmp_path))
    capsys.readouterr()
    assert main("evaluate", [str(tmp_path / "merged"), "--data", file, "--json"]) == 0
    assert table_of(capsys)[0]["all"]["questions"] == 6


def test_predictions_of_a_file_are_compared(run: Path, trained: Path, tmp_path: Path, capsys: Any) -> None:
    file = written(tmp_path / "test.json", new_rows(tmp_path))
    shutil.copytree(run, tmp_path / "other")
    for folder in (run, tmp_path / "other"):
        assert main("evaluate", [str(folder), "--data", file]) == 0
    (name,) = (each.name for each in run.glob("predictions_test*.jsonl"))
    capsys.readouterr()
    assert main("compare", [str(run / name), str(tmp_path / "other" / name), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main("report", [str(run)]) == 0
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / name, bare)
    assert main("compare", [str(bare), str(run)]) == 2
    assert f"it has {name}; name that file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "none.csv"], "--data: {folder}/none.csv is missing"),
        (["--data", "empty.csv"], "empty.csv has no rows"),
        (["--data", "odd.csv"], "its columns are a, b;"),
        (["--data", "odd.csv", "--image-folder", "nowhere"], "--image-folder: nowhere does not exist"),
        (["--image-folder", "images"], "--image-folder needs --data"),
        (["--data", "gone.csv"], "image gone.png is missing"),
    ],
)
def test_mistakes_are_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").write_text("image,question,answer\n")
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    (tmp_path / "gone.csv").write_text("image,question,answer\ngone.png,What?,That.\n")
    assert main("evaluate", [str(run), *arguments]) == 2
    found = capsys.readouterr().err
    assert message.format(folder=tmp_path) in found.replace("\n", " ")


def test_the_api_names_a_missing_file(run: Path) -> None:
    with pytest.raises(UserError, match="images: it needs data"):
        evaluate(run, images="x", quiet=True)
