"""README and docs: short, linked, generated where they can be, and made of commands that exist."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_llava.commands import main as command_line
from lora_llava.recipe import find_recipe, load_generate_recipe, load_recipe
from lora_llava.recipe.key_reference import key_reference

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
NOTEBOOK = REPOSITORY / "docs" / "notebooks" / "own_data.ipynb"


def commands(page: Path) -> list[str]:
    """The `lora-llava` and script commands of a page's indented code blocks and of its inline code."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^    ((?:\S+ && )?(?:lora-llava|python scripts/)\s?.*)$", text, re.MULTILINE)
    inline = re.findall(r"`(lora-llava [a-z-]+ [^`]*)`", " ".join(text.split()))
    return [*blocks, *inline]


COMMANDS = sorted({(page.name, command) for page in PAGES for command in commands(page)})


def test_readme_fits_150_lines() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


def test_the_reference_of_keys_is_generated() -> None:
    assert (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8") == key_reference()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_page_is_listed_in_the_readme() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert [page.name for page in PAGES[2:] if f"(docs/{page.name})" not in readme] == []


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda text: text[:60])
def test_commands_parse_and_name_existing_recipes(page: str, command: str) -> None:
    words = shlex.split(command.partition("  #")[0].partition(" > ")[0])
    if words[0] == "python":
        assert (REPOSITORY / words[1]).is_file()
        words = ["lora-llava", Path(words[1]).stem, *words[2:]]
        if words[1] == "benchmark" and words[2:] and not words[2].startswith("-"):
            return  # one of tests/benchmarks
    if len(words) < 3 or "..." in words:
        return
    args = command_line._parse(words[1:])
    recipe = str(getattr(args, "recipe", None))
    written_by_init = recipe.endswith("/recipe.yaml")
    if recipe.endswith(".yaml") and not recipe.startswith("my_") and not written_by_init and args.verb != "init":
        load = load_generate_recipe if args.verb == "generate-data" else load_recipe
        overrides = [text for text in args.overrides if not re.search(r"=/|=FOLDER|KEY|url=null", text)]
        with contextlib.chdir(REPOSITORY):
            load(find_recipe(recipe), overrides)


def notebook_cells() -> list[str]:
    cells: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in code if "install" not in cell["metadata"].get("tags", ())]


@pytest.mark.more
@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell but the installation, its shell lines included, with the demo's base and an untrained projector."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in notebook_cells():
        if cell.startswith("from lora_llava import"):  # in place of the demo's Stage 1, which takes a minute
            cell = cell.replace(
                'recipe.yaml")', 'recipe.yaml", overrides={"model.start_from": {"untrained": True}}, quiet=True)'
            )
        lines = [f"shell(f{line[1:]!r})" if line.startswith("!") else line for line in cell.splitlines()]
        names["shell"] = shell
        with contextlib.redirect_stdout(io.StringIO()):
            exec("\n".join(lines), names)
    assert names["run"].metrics["after"]["all"]["questions"] == 24
    assert names["report"]["adapter_on_bf16_base"]["max_logit_difference"] <= names["report"]["tolerance"]


def shell(line: str) -> None:
    words = shlex.split(line)
    assert words[0] == "lora-llava"
    subprocess.run([sys.executable, "-m", "lora_llava.commands.main", *words[1:]], check=True, capture_output=True)
