"""Imports point downwards (the layers of the design), and public names stay public."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import lora_llava

PACKAGE = Path(lora_llava.__file__).parent
LAYERS = [
    "core",
    "pages",
    "data",
    "recipe",
    "demo",
    "model",
    "distributed",
    "splits",
    "planning",
    "runs",
    "inference",
    "evaluation",
    "synthesis",
    "prepare",
    "training",
    "benchmark",
    "publishing",
    "api",
    "commands",
]
"""From the bottom up; a module imports from its own layer or those before it."""
APART = [("data", "recipe")]


@cache
def trees() -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")}


@cache
def imports() -> list[tuple[str, str, str]]:
    found = []
    for file, tree in trees().items():
        own = file.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(tree):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.startswith("lora_llava."):
                    found.append((str(file.relative_to(PACKAGE)), own, name.split(".")[1]))
    return found


def test_imports_point_downwards() -> None:
    assert len(imports()) > 50
    upwards = [
        f"{file} imports {target}"
        for file, own, target in imports()
        if own != "__init__" and LAYERS.index(target) > LAYERS.index(own)
    ]
    assert upwards == []


@pytest.mark.parametrize(("layer", "other"), APART)
def test_layers_that_know_nothing_of_each_other(layer: str, other: str) -> None:
    assert [f"{file} imports {target}" for file, own, target in imports() if (own, target) == (layer, other)] == []


def test_no_file_is_longer_than_400_lines() -> None:
    files = [*PACKAGE.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]
    assert [str(file) for file in files if len(file.read_text().splitlines()) > 400] == []


SAME_IDEA = {"scienceqa": {"data", "evaluation"}}
"""Modules of one name in two rooms besides verbs: the same idea, read and scored."""


def modules() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in PACKAGE.rglob("*.py"):
        if file.stem != "__init__":
            found.setdefault(file.stem, []).append(file.relative_to(PACKAGE))
    return found


def test_a_module_name_is_used_once_besides_verbs_and_their_implementation() -> None:
    twice = {
        name: [file for file in files if file.parts[0] != "commands"]
        for name, files in modules().items()
        if {file.parts[0] for file in files} != SAME_IDEA.get(name)
    }
    assert {name: files for name, files in twice.items() if len(files) > 1} == {}


def test_a_public_class_name_is_used_once() -> None:
    homes: dict[str, list[str]] = {}
    for file, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(str(file.relative_to(PACKAGE)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def test_a_room_has_at_most_15_files_at_one_level() -> None:
    """`commands` has one file per verb, found by the verb's name, and is exempt."""
    levels: dict[Path, int] = {}
    for files in modules().values():
        for file in files:
            levels[file.parent] = levels.get(file.parent, 0) + 1
    assert {str(room): count for room, count in levels.items() if count > 15 and room != Path("commands")} == {}
