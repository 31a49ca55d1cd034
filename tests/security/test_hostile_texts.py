"""Markup in texts is shown as text; secrets of this machine reach no file and no printed line."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.security.conftest import WriteRows
from tests.security.hostile import HOSTILE_TEXTS, counting_server, run_verb, write_recipe

HUB_TOKEN, SERVER_KEY = "hf_" + "aB3dE5gH7j" * 3, "sk-" + "Zx9Cv8Bn7M" * 3
SECRETS = {
    "HF_TOKEN": HUB_TOKEN,
    "OPENAI_API_KEY": SERVER_KEY,
    "WANDB_API_KEY": "w4ndb" * 8,
    "MY_PASSWORD": "0pen-Sesame",
}


class Page(HTMLParser):
    """A page's tags with their attributes, and its text outside styles and scripts."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts.append(data)
        else:
            self.text += data


def assert_harmless(page: Page) -> None:
    """Check that no tag, handler or address came from a text."""
    assert not {"iframe", "object", "embed", "link", "base", "form"} & {tag for tag, _ in page.tags}
    assert not any("alert" in script for script in page.scripts)
    for tag, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")], tag
        for key in ("src", "href", "xlink:href", "action"):
            address = attributes.get(key, "#")
            to_image = (tag, key) == ("a", "href") and re.fullmatch(r"(\.\./)*[\w/%.~-]+", address)
            assert address[:1] == "#" or address.startswith("data:image/") or to_image, (tag, key)
    policies = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'")


def test_preview_shows_markup_as_text(write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [
        {"id": text, "image": f"{number}.png", "question": f"{text} {number}", "answer": text}
        for number, text in enumerate(HOSTILE_TEXTS)
    ]
    file, page = tmp_path / "<script>alert(1)<script>.json", tmp_path / "page.html"
    file.write_text(json.dumps(rows))
    found = run_verb("preview", write_rows(file=file, validation_rows=0), "--output", page)
    assert found.code == 0, found.err
    shown = Page(page)
    assert_harmless(shown)
    assert all(text in shown.text for text in HOSTILE_TEXTS)


@pytest.fixture(scope="module")
def hostile_run(parts: Path, scienceqa: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on questions with markup, with secrets in the environment, and its printed output."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(scienceqa, folder / "data")
    problems = json.loads((folder / "data" / "problems.json").read_text())
    for number, problem in enumerate(problems.values()):
        problem["question"] = HOSTILE_TEXTS[number % len(HOSTILE_TEXTS)]
        problem["hint"] = problem["solution"] = "<script>alert('hint')</script>"
    (folder / "data" / "problems.json").write_text(json.dumps(problems))
    model = {"llm": str(parts / "llm"), "vision_tower": str(parts / "vision_tower"), "start_from": {"untrained": True}}
    content: dict[str, Any] = {
        "stage": 2,
        "output_dir": str(folder / "run"),
        "model": model,
        "lora": {"r": 4, "alpha": 8},
        "data": {"format": "scienceqa", "path": str(folder / "data"), "max_length": 400, "system_prompt": ""},
        "training": {"batch_size": 4, "learning_rate": 5e-3, "max_steps": 2, "log_every": 1},
        "evaluation": {"max_new_tokens": 4},
    }
    found = run_verb("finetune", write_recipe(folder / "recipe.yaml", content), environment=SECRETS)
    assert found.code == 0, found.err
    return folder / "run", found.out + found.err


def test_report_shows_markup_as_text(hostile_run: tuple[Path, str], tmp_path: Path) -> None:
    found = run_verb("report", hostile_run[0])
    assert found.code == 0, found.err
    pages = list(hostile_run[0].rglob("*.html"))
    assert pages
    for file in pages:
        shown = Page(file)
        assert_harmless(shown)
        assert "<script>alert(1)</script>" in shown.text


def test_no_secret_is_kept_or_printed(hostile_run: tuple[Path, str]) -> None:
    run, printed = hostile_run
    files = [file for file in run.rglob("*") if file.is_file()]
    assert {"recipe.yaml", "run.json", "metrics.json"} <= {file.name for file in files}
    for value in SECRETS.values():
        assert value not in printed
        assert [str(file) for file in files if value.encode() in file.read_bytes()] == []


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("model.llm", HUB_TOKEN, "a Hugging Face token"),
        ("data.system_prompt", f"Use {SERVER_KEY}.", "an OpenAI key"),
        ("data.system_prompt", "sk-proj-" + "a1B2" * 10, "an OpenAI key"),
        ("data.path", "https://me:secret@example.com/rows.json", "a password in a URL"),
    ],
)
def test_a_recipe_with_a_secret_is_rejected_without_printing_it(
    field: str, value: str, what: str, stage2_content: dict[str, Any], tmp_path: Path
) -> None:
    section, key = field.split(".")
    recipe = write_recipe(tmp_path / "recipe.yaml", stage2_content | {section: stage2_content[section] | {key: value}})
    plain = write_recipe(tmp_path / "plain.yaml", stage2_content)
    message = f"{field} holds {what}; remove it, a run saves a copy of its recipe\n"
    for verb, where in (([recipe], recipe), ([plain, f"{field}={value}"], plain)):
        found = run_verb("finetune", *verb)
        assert (found.code, found.out, found.err) == (2, "", f"error: {where}: {message}")
    assert not Path(stage2_content["output_dir"]).exists()


def test_a_folder_whose_name_resembles_a_key_is_accepted(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    content = stage2_content | {"output_dir": str(tmp_path / "sk-learn-experiments-of-november-2")}
    assert run_verb("finetune", write_recipe(tmp_path / "recipe.yaml", content), "--dry-run").code == 0


def test_no_url_in_a_text_is_fetched(write_rows: WriteRows, tmp_path: Path) -> None:
    with counting_server() as (url, requests):
        texts = [f"<img src={url}/a.png>", f"![]({url}/b.png)", f"{url}/c", f"<script src={url}/d.js></script>"]
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps({"question": text, "answer": text}) + "\n" for text in texts))
        recipe = write_rows(file=file, validation_rows=0)
        for verb in (["check", recipe], ["preview", recipe, "--output", tmp_path / "p.html"]):
            assert run_verb(*verb).code in (0, 1)
    assert requests == []
