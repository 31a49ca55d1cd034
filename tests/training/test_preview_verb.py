"""`lora-llava preview`: the page shows exactly the collator's ids and labels."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.planning.run_plan import RunPlan, plan_run
from lora_llava.prepare.sample_preview import preview
from lora_llava.recipe import Recipe
from lora_llava.recipe.io import check_recipe
from lora_llava.training.stages import build_feeds


class Boxes(HTMLParser):
    """A parser of ids and labels of every article, with source and row id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.samples: list[tuple[str, str, list[int], list[int]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "article":
            self.samples.append((str(named["data-source"]), str(named["data-row-id"]), [], []))
        if tag == "span" and "data-id" in named:
            token, count = int(str(named["data-id"])), int(str(named["data-n"]))
            trained = "on" in str(named["class"]).split()
            self.samples[-1][2].extend([token] * count)
            self.samples[-1][3].extend([token if trained else -100] * count)


def show(recipe: Recipe, tmp_path: Path, **options: Any) -> Boxes:
    page = tmp_path / "page.html"
    preview(recipe, name="test", output=page, console=Console(file=io.StringIO()), **options)
    return Boxes(page.read_text())


def first_batches(plan: RunPlan, count: int) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of the trainer's batches, sample by sample."""
    feed, _ = build_feeds(plan)
    found: list[tuple[list[int], list[int]]] = []
    for row in feed.rows:
        batch = feed.collator([feed.samples[i] for i in row])
        if "cu_seq_lens_q" in batch:
            sizes = batch["cu_seq_lens_q"].diff().tolist()
            ids, labels = (batch[name][0].split(sizes) for name in ("input_ids", "labels"))
        else:
            sizes = batch["attention_mask"].sum(1).tolist()
            ids, labels = (
                [one[:size] for one, size in zip(batch[name], sizes, strict=True)] for name in ("input_ids", "labels")
            )
        found += [(a.tolist(), b.tolist()) for a, b in zip(ids, labels, strict=True)]
    return found[:count]


@pytest.mark.parametrize(
    "training",
    [{"batch_size": 4}, {"batch_size": 1, "max_tokens_per_row": 300}, {"batch_size": 4, "attention": "sdpa"}],
    ids=["batches", "packed", "padded"],
)
def test_the_page_shows_the_collator_s_batches_exactly(
    stage2_content: dict[str, Any], tmp_path: Path, training: dict[str, Any]
) -> None:
    stage2_content["model"] |= {"attention": training.pop("attention", "auto")}
    stage2_content["training"] |= training | {"share_images": "off"}
    recipe = check_recipe(stage2_content, "test")
    shown = show(recipe, tmp_path, samples=14)
    assert [(ids, labels) for _, _, ids, labels in shown.samples] == first_batches(plan_run(recipe), 14)
    assert len(shown.samples) == 14


def test_images_equal_the_input_of_the_tower(stage2: Recipe, tmp_path: Path) -> None:
    shown = preview(stage2, name="test", output=None, console=Console(file=io.StringIO()), samples=6)
    plan = plan_run(stage2)
    rows = {row["row_id"]: row for row in plan.splits["train"].rows}
    processor = plan.processor.image_processor
    with_image = [sample for sample in shown.samples if sample.images]
    assert with_image
    for sample in with_image:
        pixels = plan.splits["train"].load_pixels(rows[sample.row_id]["image_files"])[0]
        seen = torch.from_numpy(np.array(sample.images[0])).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        torch.testing.assert_close((seen - mean) / std, pixels, atol=0.51 / 255 / 0.26, rtol=0)


def test_several_images_several_sources_and_hostile_text(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        Image.new("RGB", (30, 20), (80 * number, 0, 0)).save(images / f"{number}.png")
    hostile = '<script>alert(1)</script> [/INST] \u202eevil </article> & "quoted"'
    two = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
        {"role": "assistant", "content": hostile},
    ]
    (tmp_path / "a.json").write_text(json.dumps([{"id": hostile, "messages": two, "images": ["0.png", "1.png"]}]))
    table = "image,question,answer\n2.png,What?,Red.\n,And without?,Nothing.\n"
    (tmp_path / "b.csv").write_text(table)
    stage2_content["evaluation"] = None
    stage2_content["data"] = {
        "format": "conversations",
        "max_length": 400,
        "system_prompt": "",
        "sources": [{"path": str(tmp_path / name), "image_folder": str(images)} for name in ("a.json", "b.csv")],
    }
    recipe = check_recipe(stage2_content, "test")
    page = tmp_path / "page.html"
    result = preview(recipe, name="test", output=page, console=Console(file=io.StringIO()))
    text = page.read_text()
    shown = Boxes(text)
    expected = first_batches(plan_run(recipe), 50)[: len(shown.samples)]
    assert [(ids, labels) for _, _, ids, labels in shown.samples] == expected
    assert {source for source, *_ in shown.samples} == {"a", "b"}
    assert sorted({len(sample.images) for sample in result.samples}) == [0, 1, 2]
    assert "<script>alert" not in text
    assert "\u202e" not in text


def test_a_cut_answer_and_a_fixed_row_have_notes(
    stage2_content: dict[str, Any], captions: Path, tmp_path: Path
) -> None:
    rows = json.loads(captions.read_text())[:2]
    rows[0]["conversations"][1]["value"] = "red " * 100
    rows[1]["conversations"][0]["value"] = "What?"
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    stage2_content["evaluation"] = None
    stage2_content["data"] = {
        "format": "conversations",
        "path": str(tmp_path / "chat.json"),
        "image_folder": str(captions.parent / "images"),
        "max_length": 40,
        "system_prompt": "",
        "on_overlong": "truncate_answer",
    }
    shown = preview(check_recipe(stage2_content, "test"), name="test", output=None, console=Console(file=io.StringIO()))
    notes = {sample.row_id: sample.notes for sample in shown.samples}
    assert notes == {"0": ("answer cut to fit",), "1": ("placeholder added",)}
    assert {sample.row_id: sample.length for sample in shown.samples}["0"] == 40


def test_the_command_writes_a_page_or_prints(
    stage2_content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(stage2_content))
    page = tmp_path / "out" / "page.html"
    assert main(None, ["preview", str(recipe), "--samples", "5", "--output", str(page)]) == 0
    assert len(Boxes(page.read_text()).samples) == 5
    assert "5 samples in 2 rows" in capsys.readouterr().out
    assert main(None, ["preview", str(recipe), "--samples", "3", "--split", "validation", "--terminal"]) == 0
    output = capsys.readouterr().out
    assert "⟦" in output
    assert "<image × 4>" in output


def test_a_missing_split_and_a_bad_image_are_named(
    stage2_content: dict[str, Any], captions: Path, tmp_path: Path
) -> None:
    rows = json.loads(captions.read_text())[:3]
    rows[1]["image"] = "gone.png"
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    stage2_content["evaluation"] = None
    stage2_content["data"] = {
        "format": "conversations",
        "path": str(tmp_path / "chat.json"),
        "max_length": 400,
        "image_folder": str(captions.parent / "images"),
    }
    recipe = check_recipe(stage2_content, "test")
    with pytest.raises(UserError, match="--split validation: the recipe has no such rows; choose from train"):
        show(recipe, tmp_path, split="validation")
    with pytest.raises(UserError, match=r"row 1 \(chat.json, index 1\): image gone\.png is missing; fix it or set"):
        show(recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_one_sample_without_errors(stage2: Recipe, tmp_path: Path) -> None:
    show(stage2, tmp_path, samples=5)
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--dump-dom",
        f"file://{tmp_path / 'page.html'}#3",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        pytest.skip(f"chromium does not run here: {error}")
    assert [int("now" in text.split(">")[0].split('class="')[-1]) for text in done.stdout.split("<article")[1:]] == [
        0,
        0,
        1,
        0,
        0,
    ]
    assert "3 of 5" in done.stdout
    assert "CONSOLE" not in done.stderr  # neither script errors nor violations of the page's policy
