"""`lora-llava check`: every planted defect is found, none on a clean set, and the cleaned copy is clean."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.prepare.row_check import check
from lora_llava.recipe.io import check_recipe
from tests.conftest import COLOURS

Row = dict[str, Any]
Check = Callable[..., dict[str, Any]]


def said(*texts: str) -> list[Row]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def row(number: int, image: str | None = None, question: str = "Which colour?", answer: str = "It is red.") -> Row:
    text = f"<image>\n{question}" if image else question
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": f"r{number}", **({"image": image} if image else {}), "conversations": turns}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Sixteen images, no two alike."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(16):
        colour = list(COLOURS.values())[number % 3]
        Image.new("RGB", (40, 30 + number), colour).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def clean() -> list[Row]:
    """Sixteen rows with an image each and four without."""
    rows = [row(number, f"{number}.png", f"Which colour is {number}?") for number in range(16)]
    return rows + [row(number, None, f"What is {number}?", f"A number, {number}.") for number in range(16, 20)]


@pytest.fixture
def run_check(stage2_content: dict[str, Any], images: Path, tmp_path: Path) -> Check:
    """Write rows, check them by the command, and give the JSON and the exit code."""

    def checked(rows: list[Row], *options: str, code: int | None = None) -> dict[str, Any]:
        file = tmp_path / "rows.json"
        file.write_text(json.dumps(rows))
        content = stage2_content | {"evaluation": None}
        content["data"] = {
            "format": "conversations",
            "path": str(file),
            "image_folder": str(images),
            "validation_rows": 4,
            "system_prompt": "",
            "max_length": 200,
            "max_image_pixels": 10_000,
        }
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(json.dumps(content))
        found = main(None, ["check", str(recipe), "--json", str(tmp_path / "report.json"), *options])
        report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
        assert found == (1 if report["errors"] else 0)
        assert code is None or found == code
        return report

    return checked


def kinds(report: dict[str, Any], level: str) -> set[tuple[str, str]]:
    return {(finding["kind"], finding["row"]) for finding in report[level]}


def test_a_clean_set_has_nothing(run_check: Check, clean: list[Row]) -> None:
    report = run_check(clean, code=0)
    assert (report["rows"], report["errors"], report["warnings"]) == (20, [], [])
    assert {name: figures["rows"] for name, figures in report["splits"].items()} == {"train": 16, "validation": 4}


def _planted_rows(clean: list[Row]) -> list[Row]:
    human, gpt = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}
    return [
        *clean,
        row(20, "nowhere.png"),
        row(21, "cut.jpg"),
        row(22, "huge.png"),
        row(23, "../outside.png"),
        row(24, "https://example.com/a.png"),
        {"id": "r25", "image": "0.png", "conversations": [{"from": "human", "value": "<image> <image>"}, gpt]},
        {"id": "r26", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, gpt]},
        {"id": "r27", "conversations": []},
        {"id": "r28", "conversations": [human]},
        {"id": "r29", "conversations": [human, human, gpt]},
        {"id": "r30", "conversations": [{"from": "narrator", "value": "Once"}, gpt]},
        {"id": "r31", "conversations": [human, {"from": "gpt", "value": "  "}]},
        {"id": "r32", "conversations": [human, gpt], "messages": [{"role": "user", "content": "x"}]},
        {"id": "r33", "text": "no conversation"},
        row(34, None, "Say a lot.", "word " * 200),
        {"id": "r35", "conversations": "none"},
        {"id": "r36", "conversations": [{"from": "human", "value": "<image>\nWhy?"}, gpt]},
        row(37, "text.png"),
    ]


PLANTED_ERRORS = {
    ("missing image", "r20"),
    ("corrupt image", "r21"),
    ("oversized image", "r22"),
    ("outside the folder", "r23"),
    ("outside the folder", "r24"),
    ("placeholder count", "r25"),
    ("placeholder count", "r26"),
    ("empty conversation", "r27"),
    ("one-sided conversation", "r28"),
    ("role order", "r29"),
    ("unknown role", "r30"),
    ("empty answer", "r31"),
    ("both formats", "r32"),
    ("missing column", "r33"),
    ("overlong", "r34"),
    ("malformed row", "r35"),
    ("placeholder count", "r36"),
    ("corrupt image", "r37"),
}


@pytest.fixture
def broken_images(images: Path) -> Path:
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 40).convert("RGB").save(stream, "JPEG")
    (images / "cut.jpg").write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    Image.new("RGB", (200, 100)).save(images / "huge.png")
    Image.new("RGB", (20, 20)).save(images.parent / "outside.png")
    (images / "text.png").write_text("not an image")
    return images


def test_every_planted_error_is_found_and_nothing_else(run_check: Check, clean: list[Row], broken_images: Path) -> None:
    report = run_check(_planted_rows(clean), code=1)
    assert kinds(report, "errors") == PLANTED_ERRORS
    assert report["warnings"] == []
    assert report["rows"] == 38
    assert {finding["number"] for finding in report["errors"]} == set(range(20, 38))


def test_every_planted_oddity_is_a_warning(run_check: Check, clean: list[Row], images: Path) -> None:
    Image.new("RGB", (30, 30), "pink").save(images / "gif.jpg", "GIF")
    Image.new("L", (30, 30), 7).save(images / "grey.png")
    Image.new("RGBA", (30, 30), (9, 9, 9, 0)).save(images / "clear.png")
    frames = [Image.new("RGB", (30, 30), colour) for colour in COLOURS.values()]
    frames[0].save(images / "film.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20), "navy").save(images / "turned.jpg", exif=exif)
    Image.new("RGB", (3, 40), "navy").save(images / "tiny.png")
    planted = [
        row(20, "gif.jpg"),
        row(21, "grey.png"),
        row(22, "clear.png"),
        row(23, "film.gif"),
        row(24, "turned.jpg"),
        row(25, "tiny.png"),
        {**clean[0], "id": "r26"},
        {"id": "r27", "image": "1.png", "conversations": said("No mention", "x")},
        {"id": "r28", "conversations": [{"from": "gpt", "value": "Hello."}, *said("Hi?", "Yes.")]},
        {"id": "r29", "conversations": said("One?", "1.", "Two?")},
        row(30, None, "Say </s> now", "Said."),
    ]
    report = run_check([*clean, *planted], code=0)
    assert kinds(report, "warnings") == {
        ("mislabelled image", "r20"),
        ("image not RGB", "r20"),
        ("image not RGB", "r21"),
        ("image with transparency", "r22"),
        ("image not RGB", "r23"),
        ("several frames", "r23"),
        ("turned image", "r24"),
        ("tiny image", "r25"),
        ("duplicate row", "r26"),
        ("placeholder added", "r27"),
        ("leading answer cut", "r28"),
        ("unanswered end cut", "r29"),
    }


def test_the_fixed_copy_is_clean_and_the_original_as_it_was(
    run_check: Check, clean: list[Row], broken_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*_planted_rows(clean), {**clean[3], "id": "again"}]
    run_check(rows, "--fix", code=1)
    assert "19 left out" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    fixed = json.loads((tmp_path / "rows.fixed.json").read_text())
    assert fixed == clean
    report = run_check(fixed, code=0)
    assert (report["errors"], report["warnings"]) == ([], [])
    run_check(rows)
    assert main(None, ["check", str(tmp_path / "recipe.yaml"), "--fix"]) == 2  # the copy is not written over
    assert json.loads((tmp_path / "rows.fixed.json").read_text()) == fixed


def test_a_held_out_row_that_is_trained_on_is_an_error(
    stage2_content: dict[str, Any], images: Path, clean: list[Row], tmp_path: Path
) -> None:
    (tmp_path / "train.json").write_text(json.dumps(clean))
    copied = images / "renamed.png"
    copied.write_bytes((images / "5.png").read_bytes())
    held = [row(90, "renamed.png", "Which colour is 5?", "Another answer."), row(91, "6.png", "What else is there?")]
    (tmp_path / "val.json").write_text(json.dumps(held))
    stage2_content["data"] = {
        "format": "conversations",
        "path": str(tmp_path / "train.json"),
        "image_folder": str(images),
        "validation_source": {"path": str(tmp_path / "val.json"), "image_folder": str(images)},
        "max_length": 200,
        "system_prompt": "",
    }
    report = check(check_recipe(stage2_content, "test"), console=Console(file=io.StringIO()))
    assert [(f.kind, f.row, f.split) for f in report.errors] == [("held-out row in train", "r5", "train")]
    assert [(f.kind, f.row) for f in report.warnings] == [
        ("held-out image in train", "r5"),
        ("held-out image in train", "r6"),
    ]


def test_a_file_that_is_cut_off_is_a_finding_with_its_line(
    run_check: Check, clean: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_check(clean)
    text = json.dumps(clean, indent=1)
    (tmp_path / "rows.json").write_text(text[: len(text) // 2])
    assert main(None, ["check", str(tmp_path / "recipe.yaml"), "--json", str(tmp_path / "report.json")]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [finding["kind"] for finding in report["errors"]] == ["unreadable file"]
    assert f"{tmp_path}/rows.json, line " in report["errors"][0]["message"]
    assert "truncated" in report["errors"][0]["message"]


def test_cut_answers_are_reported(
    stage2_content: dict[str, Any], clean: list[Row], images: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([*clean, row(20, None, "Say a lot.", "word " * 200)]))
    stage2_content["evaluation"] = None
    stage2_content["data"] = {
        "format": "conversations",
        "path": str(tmp_path / "rows.json"),
        "image_folder": str(images),
        "max_length": 100,
        "system_prompt": "",
        "on_overlong": "truncate_answer",
    }
    report = check(check_recipe(stage2_content, "test"), console=Console(file=io.StringIO()))
    assert report.errors == []
    assert [(f.kind, f.row) for f in report.warnings] == [("answer cut", "r20")]
    figures = report.splits["train"]
    assert figures["over_limit_rows"] == 1
    assert f"the last {figures['over_limit_tokens']:,} tokens of its answer are cut" in report.warnings[0].message
    assert sum(each["rows"] for each in figures["histogram"]) == 21


def test_the_demo_s_science_is_clean(stage2: Any) -> None:
    report = check(stage2, console=Console(file=io.StringIO()))
    assert report.errors == []
    assert list(report.splits) == ["train", "validation", "test"]


def test_a_missing_file_is_a_usage_error(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    stage2_content |= {"evaluation": None}
    stage2_content["data"] = {"format": "conversations", "path": str(tmp_path / "none.json")}
    with pytest.raises(UserError, match=r"data\.path: .*none\.json is missing"):
        check(check_recipe(stage2_content, "test"), console=Console(file=io.StringIO()))


def test_a_png_that_lies_about_its_size_is_refused_before_it_is_decoded(
    run_check: Check, clean: list[Row], images: Path
) -> None:
    content = bytearray((images / "0.png").read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (images / "bomb.png").write_bytes(bytes(content))
    report = run_check([*clean, row(20, "bomb.png")], code=1)
    assert kinds(report, "errors") == {("oversized image", "r20")}
