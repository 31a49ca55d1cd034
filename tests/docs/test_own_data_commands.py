"""Every command of docs/own_data.md runs, in the order of the page, on small folders that are made here."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from pathlib import Path

import pytest
from data import folders_exported, folders_made
from docs.test_docs import REPOSITORY, commands

from lora_llava.commands.main import main
from lora_llava.demo.dataset import write_example_folder

PAGE = REPOSITORY / "docs" / "own_data.md"
FINDS_ERRORS = {"init bilder", "check bilder/recipe.yaml"}
"""Commands that end with exit code 1, since they find an error in the data, which the page then fixes."""
CHEAP = ("init", "check", "preview", "filter-captions")
SHORT = {
    "epochs: 30": "epochs: 1",
    "eval_every: 20": "eval_every: 2",
    "workers: 4": "workers: 0",
    "start_from: {stage1_recipe: demo_align.yaml}": "start_from: {untrained: true}",
}
"""What is changed in each recipe that `init` writes, so that training takes seconds."""
TRIALS = {"--trials": "2"}
"""Flags that get a smaller number."""


def page_commands() -> list[list[str]]:
    """Return the words of the page's commands in their order, without those that the page calls untested."""
    blocks = [command for command in commands(PAGE) if "/data/ScienceQA" not in command]
    untested = [command for command in blocks if "  # untested" in command]
    assert untested == ["lora-llava init my_images  # untested: takes the weights of LLaVA-1.5 7B from the Hub"]
    return [shorter(shlex.split(command)[1:]) for command in blocks if command not in untested]


def shorter(words: list[str]) -> list[str]:
    """Return the words of a command with fewer trials."""
    return [TRIALS.get(before, word) for before, word in zip(["", *words], words, strict=False)]


def make_folders() -> None:
    """Make the folders that the page names, in the working directory."""
    draw, save, numbered = folders_made.draw, folders_made.save, folders_made.numbered
    draw(Path("bilder"), *numbered(6))
    rows = "".join(f"{n}.png,Farbe?,Ton {n}\n" for n in (*range(6), 9))  # 9.png is missing
    save(Path("bilder/liste.csv"), f"Foto,Thema,Befund\n{rows}")
    folders_made.class_folders(Path("fabric"), dirty=False)
    draw(Path("survey/images"), *numbered(6))
    table = [["image", "question", "answer"], *([f"{n}.png", "What is it?", f"thing {n}"] for n in range(6))]
    folders_made.xlsx(Path("survey/survey.xlsx"), {"notes": [["only text"]], "answers": table, "drafts": table})
    folders_made.coco_boxes(Path("shop"), dirty=False)
    folders_exported.label_table(Path("photos"), dirty=False)
    save(Path("captions.json"), [{"id": str(n), "image": f"{n}.png", "caption": "a red cup"} for n in range(4)])
    for name, images in (("more", 24), ("newer", 26)):  # the first 20 are those of my_images
        write_example_folder(Path(name), images)
        lines = list(csv.reader(Path(name, "questions.csv").read_text(encoding="utf-8").splitlines()))
        Path(name, "questions.csv").unlink()
        held_out = (f"{images}.png", f"{images - 1}.png")
        for file in ("rows.csv", "test.csv"):
            mine = [line for line in lines[1:] if (line[0] in held_out) == (file == "test.csv")]
            with Path(name, file).open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows([lines[0], *mine])


def run_page(chosen: list[list[str]]) -> list[tuple[str, int]]:
    """Run commands in the working directory; return those that end with another exit code than expected."""
    wrong = []
    for words in chosen:
        print(f"\n$ lora-llava {shlex.join(words)}", flush=True)
        code = main(None, words)
        if code != int(" ".join(words[:2]) in FINDS_ERRORS):
            wrong.append((shlex.join(words), code))
        recipe = Path(words[1]) / "recipe.yaml" if words[0] == "init" else None
        if recipe and recipe.exists() and "--update" not in words:
            shorten(recipe)
    return wrong


def shorten(recipe: Path) -> None:
    """Make the training of a recipe short."""
    text = recipe.read_text(encoding="utf-8")
    for long, short in SHORT.items():
        text = text.replace(long, short)
    recipe.write_text(text, encoding="utf-8")


def test_commands_that_prepare_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("python_calamine", reason="pip install 'lora_llava[excel]'")
    monkeypatch.chdir(tmp_path)
    make_folders()
    chosen = [words for words in page_commands() if words[0] in CHEAP and not re.search(r"\bruns/", " ".join(words))]
    assert {words[0] for words in chosen} == set(CHEAP)
    assert run_page(chosen) == []
    assert main(None, ["check", "bilder/recipe.yaml"]) == 0


@pytest.mark.more
def test_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("python_calamine", reason="pip install 'lora_llava[excel]'")
    pytest.importorskip("optuna", reason="pip install 'lora_llava[optuna]'")
    monkeypatch.chdir(tmp_path)
    make_folders()
    assert run_page(page_commands()) == []
    for page in ("preview.html", "runs/my_images/report.html", "runs/my_images/inspect.html", "inspected/inspect.html"):
        assert Path(page).is_file()
    assert Path("runs/my_images-sweep/sweep.html").is_file()
    assert len(list(Path("runs/search").glob("trial-*"))) == 2
    shutil.rmtree("runs")
