"""The data set card: metadata, counts, and a training command that works."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import DatasetCard
from hypothesis import example, given
from hypothesis import strategies as st
from synthesis.sample_sets import DEMO, RESULTS, SERVER, contexts, recipe, write

from lora_llava.pages.preview_samples import escape_hidden
from lora_llava.recipe import load_recipe
from lora_llava.recipe.generate_schema import TeacherSection
from lora_llava.synthesis.dataset_card import size_category, write_card
from lora_llava.synthesis.gates.gates import REASONS
from lora_llava.synthesis.output import write_set


@pytest.mark.parametrize(
    ("rows", "category"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (158_000, "100K<n<1M"),
        (10**6, "1M<n<10M"),
        (10**7, "10M<n<100M"),
    ],
)
def test_size_categories(rows: int, category: str) -> None:
    assert size_category(rows) == category


def test_the_card_has_its_metadata_and_counts(tmp_path: Path) -> None:
    write(tmp_path / "my set", prompts={"detail": "ab" * 32}, recipe_hash="cd" * 32)
    card = DatasetCard.load(tmp_path / "my set" / "README.md")
    assert card.data.to_dict() == {
        "language": ["en"],
        "license": "other",
        "pretty_name": "my set",
        "size_categories": ["n<1K"],
        "task_categories": ["visual-question-answering", "image-text-to-text"],
        "tags": ["llava", "synthetic", "lora_llava"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "instruct.json"}]}],
    }
    for part in (
        "# my set\n",
        "2 conversations about 1 image, generated with LLaVA's method (Visual Instruction Tuning, arXiv 2304.08485, "
        "section 3): `m`, which saw no image, was given",
        "> **Incomplete:** of 6 planned samples, 1 failed and 1 were not requested.",
        "| conversation | 3 | 1 | 2 | 2.5 | 1 | 0 | 1 |",
        "| reasoning | 2 | 0 | 0 |  | 1 | 1 | 0 |",
        "| all | 6 | 2 | 3 |  | 2 | 1 | 1 |",
        f"| cut off | {REASONS['cut off']} | 3 | 1 |",
        f"| prompt, detail | SHA-256 `{'ab' * 32}` |",
        f"| recipe | SHA-256 `{'cd' * 32}` |",
        "- Text: written by `m`. The terms of use of a model or its service may forbid",
        "COCO's are CC BY 4.0",
        "under Flickr's terms of use",
    ):
        assert part in card.text
    assert "by rules" not in card.text


def test_the_datasets_library_loads_a_set_through_its_card(tmp_path: Path) -> None:
    write(tmp_path / "set")
    loaded = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    assert loaded["train"].to_list() == json.loads((tmp_path / "set" / "instruct.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("teacher", [DEMO, SERVER])
def test_the_training_command_of_the_card_is_valid(tmp_path: Path, teacher: TeacherSection) -> None:
    write(tmp_path, teacher=teacher)
    command = re.search(r"^    (lora-llava finetune .*)$", (tmp_path / "README.md").read_text(), re.MULTILINE)
    assert command
    _, verb, name, *overrides = shlex.split(command[1])
    loaded = load_recipe(name, overrides)
    assert (verb, loaded.data.format, loaded.data.path, loaded.data.image_folder) == (
        "finetune",
        "conversations",
        "instruct.json",
        "IMAGES",
    )


def test_the_card_names_images_within_the_set(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    settings = recipe(images=str(folder / "my images"))
    summary = write_set(folder, results=RESULTS, contexts=contexts(), recipe=settings, about={})
    assert summary["image_folder"] == "my images"
    card = (folder / "README.md").read_text()
    assert "The images, which `image` names, are in `my images`." in card
    assert (
        " data.path=instruct.json data.image_folder='my images' output_dir=runs/mine\n\nRun it in this folder.\n"
        in card
    )


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(name=NAMES, model=NAMES)
@example(name="\x85", model="\\")
@example(name="`*_[a](b)|<b>&amp;\n# c", model="a`b|c\n\nd")
def test_no_name_breaks_the_card(name: str, model: str, card_summary: dict[str, Any]) -> None:
    summary = card_summary | {"teacher": card_summary["teacher"] | {"answered_as": {model: 1}}}
    card = DatasetCard(write_card(name, summary))
    plain = DatasetCard(write_card("set", card_summary))
    assert card.data.pretty_name == escape_hidden(" ".join(name.split()))
    lines, usual = card.text.splitlines(), plain.text.splitlines()
    heading = next(number for number, line in enumerate(usual) if line == "# set")
    assert re.sub(r"\\(.)", r"\1", lines.pop(heading)) == f"# {card.data.pretty_name}"
    del usual[heading]
    for mark in "|`":
        assert [line.count(mark) for line in lines] == [line.count(mark) for line in usual]


@pytest.fixture(scope="module")
def card_summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write(tmp_path_factory.mktemp("set"))
